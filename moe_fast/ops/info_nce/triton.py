"""info_nce on a GPU: Triton computes tiles of logits and stores none; see ``tiled.py``.

The logits are processed in rectangles. The forward pass needs one product: a kernel reduces each
tile along both axes, and the sums of a rectangle are joined to those of the batch. The backward
pass needs three: a kernel computes the logits s_ij of a rectangle again and writes
H_ij = dL/ds_ij / (|q_i| |k_j|) (for dot products dL/ds_ij). ``H k`` and ``H^T q`` are then added to
the gradients of rows q and columns k, which are not normalised here.
A kernel that accumulated ``H k`` instead of writing H would need [rows, d] float32 in registers, or
compute the logits again for every part of d: 5 products in all at d = 256, 9 at d = 768.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.checks import without_autocast
from moe_fast.ops.info_nce.arguments import check_scale, row_weights
from moe_fast.ops.info_nce.tiled import (
    ALL_SUM,
    NEG,
    OPERATION,
    POS,
    POS_COUNT,
    POS_SUM,
    both_directions,
    gradient_terms,
    join_sums,
    new_sums,
    sides,
)
from moe_fast.ops.info_nce.tiles import Side, check_finite, project_to_tangent, with_small_ids

# The largest number of rows, and of columns, of a rectangle, by bytes per element; H takes 1/4 GB.
# 11,264 rows of 16 bits are 88 tiles of 128; times 3 tiles of 256 columns at d = 768 they make two
# full waves of an H200's 132 multiprocessors.
SPANS = {2: 11_264, 4: 8_192, 8: 4_096}
_ALIGNMENT = 128  # of rectangles, for whole tiles, and rows of H that load 16 bytes at once


@dataclass(frozen=True)
class _Against:
    """The rows and some columns, as the kernels take them.

    Attributes:
        rows, columns: sides in the kernels' form, with ids that can be compared.
        masks: which masks the kernels apply.
        side: the columns as a :class:`Side`.
    """

    rows: Any
    columns: Any
    masks: Any
    side: Side


def spans(count: int, itemsize: int) -> list[tuple[int, int]]:
    """Cut ``count`` rows into about equal parts; return (first, last) of each."""
    parts = math.ceil(count / SPANS[itemsize])
    size = math.ceil(count / parts / _ALIGNMENT) * _ALIGNMENT
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def _sides(
    a: Tensor, b: Tensor, negatives: Tensor | None, ids: Sequence[Tensor | None], cosine: bool
) -> tuple[Side, list[_Against]]:
    """Return the rows, and the rows against each kind of columns: pairs, then hard negatives."""
    from moe_fast.triton_ops.launch import row_major

    negatives = None if negatives is None else row_major(negatives)
    rows, pairs, hard = sides(row_major(a), row_major(b), negatives, ids, cosine)
    against = [_against(rows, pairs, own=True)]
    if hard is not None:
        against.append(_against(rows, hard, own=False))
    return rows, against


def _against(rows: Side, columns: Side, own: bool) -> _Against:
    from moe_fast.triton_ops import logits

    masks = logits.Masks(
        own=own,
        texts=columns.text_ids is not None,
        anchors=columns.anchor_ids is not None,
        domains=columns.domain_ids is not None,
        groups=columns.group_ids is not None,
    )
    compared = any(masks[1:])
    both = with_small_ids(rows, columns) if compared else (rows, columns)
    left, right = (logits.Side(s.x, s.inverse_norm, _ids(s) if compared else None) for s in both)
    return _Against(left, right, masks, columns)


def _ids(side: Side) -> Tensor:
    """Return the ids as [4, n] float32; rows of absent ids are never read."""
    ids = torch.zeros(4, len(side), device=side.x.device)
    given = (side.anchor_ids, side.text_ids, side.domain_ids, side.group_ids)
    for row, values in zip(ids, given, strict=True):
        if values is not None:
            row.copy_(values)
    return ids


# --- forward -------------------------------------------------------------------------------------


def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss, row losses, ranks, and the sums of rows and columns.

    The inputs are those of the tiled op.
    """
    from moe_fast.triton_ops.info_nce import own_logits

    a, b, negatives, scale, *ids, weights, label_smoothing, symmetric, cosine = inputs
    check_scale(scale)
    check_finite(a=a, b=b, negatives=negatives)
    each = row_weights(weights, a)
    rows, against = _sides(a, b, negatives, ids, cosine)
    pairs, smooth = (against[0].rows, against[0].columns), bool(label_smoothing)
    own = own_logits(*pairs, scale, against[0].masks, smooth=smooth)
    row_sums = new_sums(len(rows), scale)
    column_sums = new_sums(len(rows) if symmetric else 0, scale)
    rank = torch.ones(len(rows), dtype=torch.int64, device=a.device)
    for some in against:
        wanted = column_sums if symmetric and some.masks.own else None
        # Ranks compare with the own logits as tiles of the same size compute them.
        same = own if some is against[0] else own_logits(*pairs, scale, some.masks, smooth=smooth)
        _add_logits(some, scale, same, smooth, row_sums, wanted, rank)
    if ids[3] is None:
        for sums in (row_sums, column_sums) if symmetric else (row_sums,):
            sums[POS], sums[POS_SUM], sums[POS_COUNT] = own, own, 1
    row_loss = both_directions(row_sums, column_sums if symmetric else None, label_smoothing)
    return (each * row_loss).sum(), row_loss, rank, row_sums, column_sums


def _add_logits(
    some: _Against,
    scale: Tensor,
    own: Tensor,
    smooth: bool,
    row_sums: Tensor,
    column_sums: Tensor | None,
    rank: Tensor,
) -> None:
    """Add the logits of all rows against some columns to the sums [6, n] and to the ranks."""
    from moe_fast.triton_ops.info_nce import info_nce_sums
    from moe_fast.triton_ops.logits import Area

    size = some.side.x.dtype.itemsize
    rectangles = product(spans(len(some.rows.x), size), spans(len(some.side), size))
    for (first, last), (low, high) in rectangles:
        from_rows, from_columns, ranks = info_nce_sums(
            *(some.rows, some.columns, scale, own, Area(first, last, low, high), some.masks),
            smooth=smooth,
            want_columns=column_sums is not None,
        )
        _join(row_sums[:, first:last], from_rows, some.masks.groups, smooth)
        if column_sums is not None:
            _join(column_sums[:, low:high], from_columns, some.masks.groups, smooth)
        rank[first:last] += ranks.sum(0)


def _join(sums: Tensor, tiles: Tensor, groups: bool, smooth: bool) -> None:
    """Add the sums of tiles, [tiles, 1 or 6, n], to ``sums`` [6, n] in place."""
    others = new_sums(sums.shape[1], sums)
    others[NEG] = _log2_sum_exp2(tiles[:, NEG])
    if groups:
        others[POS] = _log2_sum_exp2(tiles[:, POS])
        others[POS_SUM:ALL_SUM] = tiles[:, POS_SUM:ALL_SUM].sum(0)
    if smooth:
        others[ALL_SUM:] = tiles[:, ALL_SUM:].sum(0)
    join_sums(sums, others)


def _log2_sum_exp2(parts: Tensor) -> Tensor:
    """Join parts [parts, n] of a log2 sum exp2 to [n]."""
    top = parts.amax(0)
    return top + (parts - top).exp2().sum(0).log2()


# --- backward ------------------------------------------------------------------------------------


def gradients(grad_loss: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of a, b, the negatives and the scale.

    The inputs are those of the tiled backward op.
    """
    a, b, negatives, scale, *ids, weights, row_sums, column_sums = inputs[:-3]
    label_smoothing, symmetric, cosine = inputs[-3:]
    each = row_weights(weights, a)
    rows, against = _sides(a, b, negatives, ids, cosine)
    by_row = _terms(row_sums, each, label_smoothing)
    by_column = _terms(column_sums, each, label_smoothing) if symmetric else None
    factor = grad_loss / 2 if symmetric else grad_loss
    smooth, size = bool(label_smoothing), a.dtype.itemsize
    grad_a = torch.empty_like(a, memory_format=torch.contiguous_format)
    grad_columns = [scale.new_zeros(some.side.x.shape) for some in against]
    total, workspace = scale.new_zeros(()), _workspace(rows, against)
    for first, last in spans(len(rows), size):
        grad_rows = scale.new_zeros((last - first, a.shape[1]))
        for some, grad in zip(against, grad_columns, strict=True):
            total += _add_gradients(
                some,
                scale,
                (by_row, by_column if some.masks.own else None),
                (first, last),
                smooth,
                grad_rows,
                grad,
                workspace,
            )
        grad_a[first:last] = _finish(rows.block(first, last), grad_rows, scale * factor)
    finished = [
        _finish(some.side, grad, scale * factor)
        for some, grad in zip(against, grad_columns, strict=True)
    ]
    grad_hard = finished[1] if len(finished) > 1 else a.new_empty((0, a.shape[1]))
    return grad_a, finished[0], grad_hard, total * (math.log(2) / scale) * factor


def _terms(sums: Tensor, weights: Tensor, label_smoothing: float) -> Tensor:
    """Stack the terms that the kernel needs of each row (or column) to [5, n]."""
    t = gradient_terms(sums, weights, label_smoothing)
    return torch.stack((t.log_total, t.positive, t.every, t.own, t.alone.to(sums.dtype)))


def _workspace(rows: Side, against: list[_Against]) -> Tensor:
    """Allocate memory for H of the largest rectangle."""
    from moe_fast.triton_ops.logits import gradient_dtype

    def longest(side: Side) -> int:
        first, last = spans(len(side), side.x.dtype.itemsize)[0]
        return math.ceil((last - first) / _ALIGNMENT) * _ALIGNMENT

    width = max(longest(some.side) for some in against)
    return rows.x.new_empty(longest(rows), width, dtype=gradient_dtype(rows.x.dtype))


def _add_gradients(
    some: _Against,
    scale: Tensor,
    terms: tuple[Tensor, Tensor | None],
    span: tuple[int, int],
    smooth: bool,
    grad_rows: Tensor,
    grad_columns: Tensor,
    workspace: Tensor,
) -> Tensor:
    """Add ``H k`` of a span of rows to ``grad_rows`` and ``H^T q`` to ``grad_columns``.

    Returns:
        [] the sum of ``G s`` in base 2, with G = dL/ds.
    """
    from moe_fast.triton_ops.info_nce_grad import info_nce_grad
    from moe_fast.triton_ops.logits import Area, padded

    total = scale.new_zeros(())
    first, last = span
    for low, high in spans(len(some.side), some.side.x.dtype.itemsize):
        h = workspace[: padded(last - first), : padded(high - low)]
        area = Area(first, last, low, high)
        total += info_nce_grad(
            some.rows, some.columns, scale, *terms, area, some.masks, h, smooth=smooth
        ).sum()
        _add_product(grad_rows, h, some.columns.x[low:high])
        _add_product(grad_columns[low:high], h.t(), some.rows.x[first:last])
    return total


def _add_product(total: Tensor, h: Tensor, x: Tensor) -> None:
    """Add ``h x`` to ``total``; h is padded."""
    from moe_fast.triton_ops.add_product import add_product

    if by_cublas(total, h, x):
        torch.addmm(total, h[: len(total), : len(x)], x, out_dtype=total.dtype, out=total)
    else:
        add_product(total, h, x)


def by_cublas(total: Tensor, h: Tensor, x: Tensor) -> bool:
    """Whether cuBLAS adds ``h x``, of 16 bits both, to a float32 total in one call."""
    narrow = h.dtype == x.dtype and h.dtype.itemsize == 2 and total.dtype == torch.float32
    cuda = total.device.type == "cuda" and torch.version.hip is None
    return narrow and cuda and "dtype_out" in torch.ops.aten.addmm.overloads()


def _finish(side: Side, grad: Tensor, factor: Tensor) -> Tensor:
    """Return dL/dx in x's dtype from ``H k`` or ``H^T q``, which is overwritten."""
    project_to_tangent(side, grad)
    return grad.mul_(factor).to(side.x.dtype)


# --- the op --------------------------------------------------------------------------------------

_run_op = OPERATION.implement(
    "info_nce_triton",
    triton_backend.on_device(without_autocast(forward)),
    triton_backend.on_device(without_autocast(gradients)),
)


def _run(a, b, negatives, *rest):
    if a.dtype != b.dtype or (negatives is not None and a.dtype != negatives.dtype):
        # Under autocast they may differ; the kernels multiply one dtype with itself.
        dtype = rest[0].dtype
        a, b, negatives = (None if x is None else x.to(dtype) for x in (a, b, negatives))
    return _run_op(a, b, negatives, *rest)[:3]


triton_backend.offer("info_nce", _run)
