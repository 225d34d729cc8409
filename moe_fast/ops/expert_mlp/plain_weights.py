"""Converts the weights that expert_mlp is given to the plain form that most kernels take.

Those given may have 16 bits beside a wider x, and a gated up projection may have its halves apart,
[E, 2, H, D]. Plain weights have x's dtype, and the up projection is [E, 2H, D].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


def plain(x: Tensor, up_proj: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Return the weights and biases in plain form; those that have it already are not copied."""
    up_proj = up_proj.flatten(1, 2) if up_proj.dim() == 4 else up_proj
    return [None if t is None else t.to(x.dtype) for t in (up_proj, *others)]


def forward_on_plain(kernel: Callable) -> Callable:
    """Decorate a forward pass so that it gets plain weights."""

    @functools.wraps(kernel)
    def run(x: Tensor, *arguments: Any) -> Any:
        return kernel(x, *plain(x, *arguments[:4]), *arguments[4:])

    return run


def backward_on_plain(kernel: Callable) -> Callable:
    """Decorate a backward pass so that it gets plain weights; gradients have the given form."""

    @functools.wraps(kernel)
    def run(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        given = arguments[:4]
        grad_x, *grads, grad_weights = kernel(grad_y, x, *plain(x, *given), *arguments[4:])
        for i, weight in enumerate(given):
            if weight is not None:
                grads[i] = grads[i].to(weight.dtype).view(weight.shape)
        return grad_x, *grads, grad_weights

    return run
