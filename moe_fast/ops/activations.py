"""The activations that an expert can have, with derivatives, plain and gated.

``z`` is the output of the up projection, H the hidden size. Plain: ``h = act(z)``. Gated: ``z`` is
split along the last dimension into halves ``[z1, z2]``, and ``h = act(z1) * z2`` (the first half is
activated, as in transformers' ModernBERT). ``clamped_swiglu`` changes the second half too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An elementwise function, and its backward pass.

    Attributes:
        name: its name in compiled kernels.
        forward: ``z -> act(z)``.
        backward: ``(gradient of act(z), z) -> gradient of z``.
        kernels: the backends whose compiled kernels have it; the other backends leave it to
            PyTorch.
        second: computes from ``z2`` what gated experts multiply ``act(z1)`` by.
        second_backward: ``(gradient of second(z2), z2) -> gradient of z2``.
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    kernels: tuple[str, ...] = ("triton", "cpp")
    second: Callable[[Tensor], Tensor] = lambda z2: z2
    second_backward: Callable[[Tensor, Tensor], Tensor] = lambda grad, z2: grad


_GELU = Activation("gelu", F.gelu, lambda grad, z: _aten.gelu_backward(grad, z))
_GELU_TANH = Activation(
    "gelu_tanh",
    lambda z: F.gelu(z, approximate="tanh"),
    lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
)
_RELU = Activation("relu", F.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0))
_SILU = Activation("silu", F.silu, lambda grad, z: _aten.silu_backward(grad, z))

# The gate of GPT-OSS is h = z1 sigmoid(ALPHA z1) (z2 + 1), with z1 clamped to at most LIMIT, and z2
# to at most LIMIT in magnitude. All published models have these two constants, as the kernels do.
ALPHA, LIMIT = 1.702, 7.0


def _clamped(z: Tensor) -> Tensor:
    z = z.clamp(max=LIMIT)
    return z * torch.sigmoid(ALPHA * z)


def _clamped_backward(grad: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(ALPHA * z)
    return torch.where(z <= LIMIT, grad * s * (1 + ALPHA * z * (1 - s)), 0)


_CLAMPED_SWIGLU = Activation(
    "clamped_swiglu",
    _clamped,
    _clamped_backward,
    second=lambda z2: z2.clamp(-LIMIT, LIMIT) + 1,
    second_backward=lambda grad, z2: torch.where(z2.abs() <= LIMIT, grad, 0),
)

# Keys are transformers' names (ACT2FN), if it has one; "gelu" is the exact form, with erf.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": _GELU,
    "gelu_tanh": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": _RELU,
    "silu": _SILU,
    "swish": _SILU,
    "clamped_swiglu": _CLAMPED_SWIGLU,
}


def activate(z: Tensor, act: str, gated: bool) -> Tensor:
    """Compute ``h`` from ``z``: [..., H] -> [..., H], or gated [..., 2H] -> [..., H]."""
    of = ACTIVATIONS[act]
    if not gated:
        return of.forward(z)
    z1, z2 = z.chunk(2, dim=-1)
    return of.forward(z1) * of.second(z2)


def activate_backward(grad_h: Tensor, z: Tensor, act: str, gated: bool) -> Tensor:
    """Compute the gradient of ``z`` from that of ``h``; shapes as in :func:`activate`."""
    of = ACTIVATIONS[act]
    if not gated:
        return of.backward(grad_h, z)
    z1, z2 = z.chunk(2, dim=-1)
    grad_z1 = of.backward(grad_h * of.second(z2), z1.contiguous())
    return torch.cat((grad_z1, of.second_backward(grad_h * of.forward(z1), z2)), dim=-1)
