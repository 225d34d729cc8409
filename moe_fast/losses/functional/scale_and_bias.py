"""Checks the scale and the bias of a contrastive loss, and makes them tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_fast.ops.checks import checks_values
from moe_fast.ops.info_nce.arguments import as_scale, check_scale


def checked_scale(scale: float | Tensor, like: Tensor) -> Tensor:
    """Return ``scale`` as a [] tensor with the dtype and device of ``like``.

    Raises:
        ValueError: ``scale`` has more than one element or (if values are checked) is not positive
            and finite.
        TypeError: ``scale`` is neither a number nor a tensor.
    """
    scale = as_scale(scale, like.device, like.dtype)
    if not torch.compiler.is_compiling():  # a graph cannot branch on a value
        check_scale(scale)
    return scale


def checked_bias(bias: float | Tensor, like: Tensor) -> Tensor:
    """Return ``bias`` as a [] tensor with the dtype and device of ``like``.

    Raises:
        ValueError: ``bias`` has more than one element or (if values are checked) is not finite.
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
