"""The two numbers that a contrastive loss may learn, as tensors: a scale and a bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_fast.ops.checks import checks_values
from moe_fast.ops.info_nce.arguments import as_scale, check_scale


def checked_scale(scale: float | Tensor, like: Tensor) -> Tensor:
    """``scale`` as a [] tensor of the dtype and on the device of ``like``.

    Raises:
        ValueError: more than one element or, where values are checked, not above 0 and finite.
    """
    scale = as_scale(scale, like.device, like.dtype)
    if not torch.compiler.is_compiling():  # a graph cannot branch on a value
        check_scale(scale)
    return scale


def checked_bias(bias: float | Tensor, like: Tensor) -> Tensor:
    """``bias`` as a [] tensor of the dtype and on the device of ``like``.

    Raises:
        ValueError: more than one element or, where values are checked, not finite.
    """
    if not isinstance(bias, Tensor):
        if not math.isfinite(bias):
            raise ValueError(f"bias must be finite; got {bias}.")
        return torch.full((), bias, device=like.device, dtype=like.dtype)
    if bias.numel() != 1:
        raise ValueError(f"bias must have one element; got shape {list(bias.shape)}.")
    bias = bias.reshape(()).to(device=like.device, dtype=like.dtype)
    if not torch.compiler.is_compiling() and checks_values(bias.device) and not bias.isfinite():
        raise ValueError(f"bias must be finite; got {bias.item()}.")
    return bias
