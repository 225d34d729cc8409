"""The activations that an expert can have, with derivatives, plain and gated.

``z`` is the output of the up projection, H the hidden size. Plain: ``h = act(z)``. Gated: ``z`` is
split along the last dimension into halves ``[z1, z2]``, and ``h = act(z1) * z2`` (the first half is
activated, as in transformers' ModernBERT).
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
    """

    name: str
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    kernels: tuple[str, ...] = ("triton", "cpp")


_GELU = Activation("gelu", F.gelu, lambda grad, z: _aten.gelu_backward(grad, z))
_GELU_TANH = Activation(
    "gelu_tanh",
    lambda z: F.gelu(z, approximate="tanh"),
    lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
)
_RELU = Activation("relu", F.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0))
_SILU = Activation("silu", F.silu, lambda grad, z: _aten.silu_backward(grad, z))

# Keys are transformers' names (ACT2FN); "gelu" is the exact form, with erf.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": _GELU,
    "gelu_tanh": _GELU_TANH,
    "gelu_new": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "relu": _RELU,
    "silu": _SILU,
    "swish": _SILU,
}


def activate(z: Tensor, act: str, gated: bool) -> Tensor:
    """Compute ``h`` from ``z``: [..., H] -> [..., H], or gated [..., 2H] -> [..., H]."""
    if not gated:
        return ACTIVATIONS[act].forward(z)
    z1, z2 = z.chunk(2, dim=-1)
    return ACTIVATIONS[act].forward(z1) * z2


def activate_backward(grad_h: Tensor, z: Tensor, act: str, gated: bool) -> Tensor:
    """Compute the gradient of ``z`` from that of ``h``; shapes as in :func:`activate`."""
    if not gated:
        return ACTIVATIONS[act].backward(grad_h, z)
    z1, z2 = z.chunk(2, dim=-1)
    grad_z1 = ACTIVATIONS[act].backward(grad_h * z2, z1.contiguous())
    return torch.cat((grad_z1, grad_h * ACTIVATIONS[act].forward(z1)), dim=-1)
