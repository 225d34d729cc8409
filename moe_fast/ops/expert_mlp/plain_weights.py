"""Weights as most kernels take them, from what expert_mlp is given.

Given: of 16 bits beside a wider x; a gated up projection with its halves apart, [E, 2, H, D].
Plain: in x's dtype, and [E, 2H, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def plain(x: Tensor, up_proj: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The weights and biases, plain; those that are so already are not copied."""
    up_proj = up_proj.flatten(1, 2) if up_proj.dim() == 4 else up_proj
    return [None if t is None else t.to(x.dtype) for t in (up_proj, *others)]


def forward_on_plain(kernel: Callable) -> Callable:
    """A forward that is handed plain weights."""

    @functools.wraps(kernel)
    def run(x: Tensor, *arguments: Any) -> Any:
        return kernel(x, *plain(x, *arguments[:4]), *arguments[4:])

    return run


def backward_on_plain(kernel: Callable) -> Callable:
    """A backward that is handed plain weights; the gradients come back in the given form."""

    @functools.wraps(kernel)
    def run(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        given = arguments[:4]
        grad_x, *grads, grad_weights = kernel(grad_y, x, *plain(x, *given), *arguments[4:])
        for i, weight in enumerate(given):
            if weight is not None:
                grads[i] = grads[i].to(weight.dtype).view(weight.shape)
        return grad_x, *grads, grad_weights

    return run
