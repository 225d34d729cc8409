"""Comparing a loss with an independent form of it, value and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import settings
from torch import Tensor

F64 = torch.float64
# float64 rounds at 1.1e-16; far above any rounding of these few terms, far below any one of them.
TOLERANCE = 1e-10

# The same examples in every run: a failure must be reproducible from its log.
property_test = settings(deadline=None, derandomize=True, database=None, max_examples=25)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """A leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype).requires_grad_()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """max|actual - expected| <= tolerance * max(|expected|, 1)."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * max(1.0, expected.abs().max().item()), difference


def assert_same(
    loss: Callable[[], Tensor],
    oracle: Callable[[], Tensor],
    *inputs: Tensor,
    tolerance: float = TOLERANCE,
) -> None:
    """Two losses of the same leaves agree in value and in every gradient, which are not all 0."""
    actual, expected = loss(), oracle()
    assert actual.shape == ()
    assert_close(actual, expected, tolerance)
    ours = torch.autograd.grad(actual, inputs, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True)
    assert any(grad.abs().max() > 1e-6 for grad in theirs if grad.numel())
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, tolerance)
