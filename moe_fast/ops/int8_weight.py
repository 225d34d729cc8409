"""Weights in 8-bit integers, and the quantisation of their inputs: what the int8 ops share.

A weight W [N, K] is symmetric, with one scale per row (output channel):

    scale_n = max over k of |W[n, k]| / 127,   V[n, k] = round(W[n, k] / scale_n)

An input x is quantised to unsigned bytes, with one scale s and zero point z per row (token), from
the least and the greatest value of the row and 0, or from a range that is fixed beforehand:

    s = (high - low) / 255,   z = round(-low / s),   q_k = clamp(round(x_k / s) + z, 0, 255)

So 0 is exact, and

    (W x)_n is about s scale_n (sum over k of q_k V[n, k] - z sums_n)
    sums_n = sum over k of V[n, k]

where all sums are integers, exact in 32 bits. Rounding is to nearest even. A row with a value that
is not finite gives NaN; one whose values and 0 are all nearer to each other than 1e-30 counts as 0.

Source: Jacob et al., arXiv 1712.05877, with a range per token instead of a fixed one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_fast.ops.checks import check_dtype, check_shape, wants_gradients

PANEL, GROUP, DEPTH = 16, 4, 64  # rows in a panel, columns multiplied at once, in an AMX tile
MAX_COLUMNS = 65536  # sums of 255 * 127 stay within 32 bits


class Int8Weight(NamedTuple):
    """A weight [N, K], or E of them, as this module's docstring defines it.

    Attributes:
        values: V in the order in which processors multiply it, int8 [..., P, Q, 16, 4]: row
            ``16 p + i`` and column ``4 q + j`` stand at ``[p, q, i, j]``. P is N / 16, rounded up,
            and Q is 16 times K / 64, rounded up; what is added is 0.
        scale: float32 [..., N].
        sums: int32 [..., N].
    """

    values: Tensor
    scale: Tensor
    sums: Tensor


def packed_shape(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Return [P, Q, 16, 4], the shape of the values of a weight [rows, columns]."""
    return -(-rows // PANEL), -(-columns // DEPTH) * (DEPTH // GROUP), PANEL, GROUP


def quantize_weight(weight: Tensor) -> Int8Weight:
    """Quantise a weight [..., N, K], of any floating dtype, and pack it.

    Raises:
        ValueError: for a value that is not finite, and for more than 65,536 columns.
    """
    if weight.shape[-1] > MAX_COLUMNS:
        raise ValueError(
            f"weight must have at most {MAX_COLUMNS} columns in int8, or sums overflow 32 bits; "
            f"got {weight.shape[-1]}."
        )
    weight = weight.detach().float()
    largest = weight.abs().amax(-1)
    if not bool(largest.isfinite().all()):
        raise ValueError("weight must be finite to be quantised; got NaN or infinity in it.")
    scale = largest / 127
    # Rows that are nearly 0 count as 0, as the inputs do.
    inverse = torch.where(scale > 1e-30, 1 / scale, 0)
    values = (weight * inverse[..., None]).round().clamp(-127, 127).to(torch.int8)
    return Int8Weight(pack(values), scale, values.sum(-1, dtype=torch.int32))


def pack(values: Tensor) -> Tensor:
    """Arrange int8 [..., N, K] as the ``values`` of an :class:`Int8Weight`."""
    rows, columns = values.shape[-2:]
    panels, groups, *_ = packed_shape(rows, columns)
    add = (0, groups * GROUP - columns, 0, panels * PANEL - rows)
    padded = torch.nn.functional.pad(values, add)
    return (
        padded.unflatten(-1, (groups, GROUP))
        .unflatten(-3, (panels, PANEL))
        .transpose(-3, -2)
        .contiguous()
    )


def unpack(values: Tensor, rows: int, columns: int) -> Tensor:
    """Return int8 [..., N, K]; the inverse of :func:`pack`."""
    return values.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., :rows, :columns]


def dequantize_weight(weight: Int8Weight, columns: int) -> Tensor:
    """Return the float32 weight [..., N, columns] that ``weight`` stands for."""
    values = unpack(weight.values, weight.scale.shape[-1], columns)
    return values.float() * weight.scale[..., None]


def quantize_rows(x: Tensor, fixed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise x [T, K] as this module's docstring says.

    Args:
        fixed: [2], the least and the greatest value; ``None``: each row has its own.

    Returns:
        q [T, K] uint8, s [T, 1] float32 and z [T, 1] int32.
    """
    x = x.float()
    if fixed is None:
        if x.shape[0] == 0:
            low = high = x.new_zeros(0, 1)
        else:
            low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    else:
        low, high = (end.expand(x.shape[0], 1) for end in fixed.float())
    span = high - low
    poison = (x * 0).sum(-1, keepdim=True)
    scale = torch.where(span < 1e-30, 0, span / 255)
    inverse = torch.where(span < 1e-30, 0, 1 / scale)
    zero = torch.nan_to_num(-low * inverse).round().int()
    q = torch.nan_to_num(x * inverse).clamp(-512, 512).round().int() + zero
    return q.clamp(0, 255).to(torch.uint8), scale + poison, zero


def integer_product(q: Tensor, values: Tensor) -> Tensor:
    """Return the exact sums of q [T, K] uint8 and values [N, K] int8, [T, N] float64."""
    return q.double() @ values.double().t()


class Int8Norm(NamedTuple):
    """What follows a product: ``LayerNorm(y + residual)``; without a residual, nothing.

    Attributes:
        residual: [T, N], in the dtype of the result.
        weight, bias: [N] float32, LayerNorm's gamma and beta.
        eps: is added to the variance.
    """

    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


def normalized(
    y: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return y [T, N] float32 after an :class:`Int8Norm`."""
    if residual is None:
        return y
    return torch.nn.functional.layer_norm(y + residual.float(), y.shape[1:], weight, bias, eps)


def expert_of(
    weight: Int8Weight, bias: Tensor | None, expert: int
) -> tuple[Int8Weight, Tensor | None]:
    """Return the weight and the bias of one of E experts."""
    return Int8Weight(*(part[expert] for part in weight)), None if bias is None else bias[expert]


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, fixed: Tensor | None) -> Tensor:
    """Return W x + bias [T, N] float32, in plain PyTorch: the reference of the int8 ops."""
    q, scale, zero = quantize_rows(x, fixed)
    values = unpack(weight.values, weight.scale.shape[-1], x.shape[1])
    exact = integer_product(q, values) - zero * weight.sums.double()
    y = exact.float() * (scale * weight.scale)
    return y if bias is None else y + bias


def check_weight(
    name: str, weight: Int8Weight, lead: tuple[int, ...], columns: int
) -> tuple[int, ...]:
    """Check that ``weight`` is one of [..., N, columns], and return the shape [..., N] of its rows.

    Raises:
        ValueError, TypeError: naming what does not fit.
    """
    letters = "[E, N]" if lead else "[N]"
    check_shape(f"{name}.scale", weight.scale, (*lead, None), letters)
    rows = weight.scale.shape[-1]
    check_shape(f"{name}.sums", weight.sums, tuple(weight.scale.shape), letters)
    shape = (*lead, *packed_shape(rows, columns))
    check_shape(f"{name}.values", weight.values, shape, "[..., P, Q, 16, 4]")
    for part, dtype in (("values", torch.int8), ("scale", torch.float32), ("sums", torch.int32)):
        given = getattr(weight, part).dtype
        if given != dtype:
            raise TypeError(f"{name}.{part} must have dtype {dtype}; got {given}.")
    if not 1 <= columns <= MAX_COLUMNS or rows < 1:
        raise ValueError(
            f"{name} must have rows, and 1 to {MAX_COLUMNS} columns; got {rows} and {columns}."
        )
    return tuple(weight.scale.shape)


def check_rows(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise unless each tensor, if given, is float32 and of the shape beside it."""
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        check_shape(name, tensor, shape, "[...]")
        check_dtype(name, tensor, (torch.float32,))


def check_norm(
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Raise unless the tensors of an :class:`Int8Norm` fit a result of this shape and dtype."""
    if residual is None:
        return
    check_shape("norm.residual", residual, shape, "[T, N]")
    check_dtype("norm.residual", residual, (dtype,))
    for name, tensor in (("norm.weight", weight), ("norm.bias", bias)):
        check_shape(name, tensor, shape[1:], "[N]")  # type: ignore[arg-type]
        check_dtype(name, tensor, (torch.float32,))  # type: ignore[arg-type]


def check_inference(op: str, *tensors: Tensor | None) -> None:
    """Raise ``ValueError`` if autograd would need gradients of ``tensors``."""
    if wants_gradients(*tensors):
        raise ValueError(
            f"{op} has no gradient, since rounding to 8-bit integers has none, and some are wanted "
            "(none are under torch.no_grad()). Train the model before it is quantised."
        )


def check_range(name: str, fixed: Tensor | None) -> None:
    """Raise ``ValueError`` unless a fixed range is [low, high], finite, with 0 in it."""
    if fixed is None or fixed.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = fixed.tolist()
    if not (low <= 0 <= high and math.isfinite(high - low)):
        raise ValueError(f"{name} must be finite and contain 0; got {[low, high]}.")
