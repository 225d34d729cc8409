"""Tiles of a contrastive loss's logits: functions for losses that never hold all B x B of them.

A tile is a block of rows (anchors) against a block of columns (candidates):

    s_ij = scale * <q_i, k_j>,  with the embeddings q and k, for cosines at unit length

The gradient G = dL/ds of a tile gives ``dq += scale * G . k`` and ``dk += scale * G^T . q``. No
normalised copy [B, d] of the columns is made: the tile is multiplied by their inverse norms, and
the projections in the gradient of a normalisation are done once, row by row, at the end.

On a CPU tiles fit in the cache; on a GPU they are large enough to fill it. Their memory is
allocated once. They hold logits in base 2, ``s / ln 2``, because exp2 is the fastest exponential,
and on a CPU the only one without a slow range (exp takes 30 times as long for masked logits).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_fast.ops.checks import checks_values, compute_dtype
from moe_fast.ops.cpu_matmul import add_product, multiply

TILE_ROWS = {"cpu": 1024, "cuda": 4096}
_FEW_ROWS = 128  # sorting ids pays for more rows, see comparable()
_SHORTEST = 1e-12  # as torch.nn.functional.normalize: a shorter vector has no direction

# The logit of pairs that are left out of a softmax: finite, so that no NaN arises, and so low that
# its exponential is 0 compared with any other.
MASKED = -1e30


@dataclass(frozen=True)
class Side:
    """n embeddings on one side of the logits, and the ids that determine which pairs are masked.

    Attributes:
        x: [n, d].
        inverse_norm: [n], 1 / length, 0 for a zero vector; ``None`` for dot products.
        anchor_ids: [n], the text of each pair's anchor; ``None`` for hard negatives, or without
            masks.
        text_ids: [n], the text of each pair's positive, or of the hard negative.
        domain_ids: [n]; a hard negative has the domain of its row.
        group_ids: [n]; ``None`` for hard negatives.
    """

    x: Tensor
    inverse_norm: Tensor | None
    anchor_ids: Tensor | None = None
    text_ids: Tensor | None = None
    domain_ids: Tensor | None = None
    group_ids: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def block(self, first: int, last: int) -> Side:
        """Return the rows ``first`` to ``last - 1``."""
        if first == 0 and last == len(self):
            return self

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[first:last]

        ids = (self.anchor_ids, self.text_ids, self.domain_ids, self.group_ids)
        return Side(self.x[first:last], cut(self.inverse_norm), *map(cut, ids))


def inverse_norm(x: Tensor) -> Tensor:
    """Return 1 / length of each row of x [n, d], [n] in at least float32; 0 for a zero vector."""
    dtype = compute_dtype(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    # In another order the gradient of a zero vector would be NaN.
    return 1 / torch.where(norm > _SHORTEST, norm, torch.inf)


def check_finite(**embeddings: Tensor | None) -> None:
    """Raise ``ValueError`` that names a row with NaN or infinity, if values are checked.

    Values whose products would overflow raise, too: they would give a cosine of 0 and a dot product
    of NaN.
    """
    if torch.compiler.is_compiling():
        return
    for name, x in embeddings.items():
        if x is None or x.numel() == 0 or not checks_values(x.device):
            continue
        dtype = compute_dtype(x.dtype)
        most = math.sqrt(torch.finfo(dtype).max / x.shape[1])
        low, high = (bound.item() for bound in torch.aminmax(x))  # one pass, no memory
        if -most <= low and high <= most:  # false for NaN
            continue
        infinite = ~x.isfinite()
        if infinite.any():
            row = int(infinite.any(1).nonzero()[0])
            raise ValueError(f"{name} must be finite; row {row} holds NaN or infinity.")
        row = int((x.abs() > most).any(1).nonzero()[0])
        raise ValueError(
            f"{name} must hold values up to {most:.1e}, whose products fit in {dtype}; row {row} "
            f"holds {x[row].abs().max().item():.1e}."
        )


def tile_size(device: torch.device) -> int:
    """The largest number of rows, and of columns, of a tile."""
    return TILE_ROWS.get(device.type, TILE_ROWS["cuda"])


def blocks(count: int, device: torch.device) -> list[tuple[int, int]]:
    """Return (first, last) of the blocks into which ``count`` rows are cut."""
    size = tile_size(device)
    return [(first, min(first + size, count)) for first in range(0, count, size)]


class Workspace:
    """Memory for a few tiles at a time, allocated once; allocating each tile would cost more time.

    Args:
        rows, columns: the numbers of rows and columns of all logits.
        like: a tensor with the logits' dtype and device.
    """

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        size = tile_size(like.device)
        self._area = min(rows, size) * min(columns, size)
        self._like = like
        self._memory: dict[str, Tensor] = {}

    def tile(self, name: str, rows: int, columns: int) -> Tensor:
        """Return uninitialised memory [rows, columns]; a second call with ``name`` reuses it."""
        if name not in self._memory:
            self._memory[name] = self._like.new_empty(self._area)
        return self._memory[name][: rows * columns].view(rows, columns)


def scaled_rows(rows: Side, scale: Tensor) -> Tensor:
    """Return ``scale / ln 2 * q``, [m, d] in the scale's dtype: the left factor of the product."""
    q, scale = rows.x.to(scale.dtype), scale / math.log(2)
    return q * (scale if rows.inverse_norm is None else (scale * rows.inverse_norm)[:, None])


def logits_tile(scaled_q: Tensor, columns: Side, space: Workspace) -> Tensor:
    """Return s / ln 2, [m, n], in the workspace; the caller may overwrite it."""
    out = space.tile("logits", len(scaled_q), len(columns))
    s = multiply(scaled_q, columns.x.to(scaled_q.dtype).t(), out=out)
    return s if columns.inverse_norm is None else s.mul_(columns.inverse_norm)


def add_products(
    grad: Tensor, scaled_q: Tensor, columns: Side, grad_rows: Tensor, grad_columns: Tensor
) -> None:
    """Add ``G . k`` to ``grad_rows`` [m, d] and ``G^T . scaled_q`` to ``grad_columns`` [n, d].

    ``grad`` [m, n] holds G and is overwritten. The sums are finished by :func:`row_epilogue` and
    :func:`finish_columns`. Because the columns' ``x`` is not normalised, G is multiplied by their
    inverse norms first; so ``grad_columns`` contains this factor, too.
    """
    if columns.inverse_norm is not None:
        grad.mul_(columns.inverse_norm)
    add_product(grad_rows, grad, columns.x.to(grad.dtype))
    add_product(grad_columns, grad.t(), scaled_q)


def row_epilogue(rows: Side, grad: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
    """Finish the gradient of the rows (anchors), in place; return dL/dscale, [].

    On entry ``grad`` [m, d] holds ``sum_j G_ij k_j``, summed over all column tiles, with
    G = dL/dlogits. On return it holds dL/dx for the un-normalised rows, times ``factor``. dL/dscale
    is ``factor * sum_ij G_ij <q_i, k_j> = factor * sum_i <q_i, sum_j G_ij k_j>``.
    """
    total = project_to_tangent(rows, grad)
    if rows.inverse_norm is not None:
        grad.mul_(rows.inverse_norm[:, None])
    grad.mul_(scale * factor)
    return total * factor


def finish_columns(columns: Side, grad: Tensor, factor: Tensor) -> None:
    """Finish the gradient of the columns (candidates), in place.

    On entry ``grad`` [n, d] holds ``inverse_norm * G^T . scaled_q``, summed over all row tiles,
    with G = dL/dlogits. On return it holds dL/dx for the un-normalised columns, times ``factor``.
    ``scaled_q`` carries a factor 1 / ln 2, because the forward pass uses exp2; it is divided out
    here.
    """
    project_to_tangent(columns, grad)
    grad.mul_(factor * math.log(2))


def project_to_tangent(side: Side, grad: Tensor) -> Tensor:
    """Project ``grad`` [n, d] onto the tangent space of the unit sphere, in place.

    For dot products, which depend on the embeddings' lengths, ``grad`` stays as it is.

    Returns:
        [] the sum of ``<u, grad>`` before the projection, with u = x at unit length, or u = x for
        dot products.
    """
    total = grad.new_zeros(())
    for first, last in blocks(len(side), grad.device):
        rows, part = side.block(first, last), grad[first:last]
        u = rows.x.to(grad.dtype)
        if rows.inverse_norm is not None:
            u = u * rows.inverse_norm[:, None]
        along = torch.linalg.vecdot(u, part)
        if rows.inverse_norm is not None:
            part.addcmul_(u, along[:, None], value=-1)
        total += along.sum()
    return total


def comparable(rows: Side, columns: Side) -> tuple[Side, Side]:
    """Return both sides with small ids, see :func:`with_small_ids`; few rows keep their ids.

    For few rows, finding small ids would take longer than it saves.
    """
    if max(len(rows), len(columns)) <= min(_FEW_ROWS, tile_size(rows.x.device)):
        return rows, columns
    return with_small_ids(rows, columns)


def with_small_ids(rows: Side, columns: Side) -> tuple[Side, Side]:
    """Replace the ids of both sides by small floats that are equal for equal ids.

    Floats are faster to compare than int64. They are exact up to 2^24 ids, more than a batch has.
    """
    sides = [rows, columns]
    for names in (("anchor_ids", "text_ids"), ("domain_ids",), ("group_ids",)):
        given = [(n, i) for n in names for i in (0, 1) if getattr(sides[i], n) is not None]
        if not given:
            continue
        known = torch.cat([getattr(sides[i], n) for n, i in given]).sort().values
        for n, i in given:
            small = torch.searchsorted(known, getattr(sides[i], n).contiguous())
            sides[i] = replace(sides[i], **{n: small.to(torch.float32)})
    return sides[0], sides[1]


def tile_masks(
    rows: Side, columns: Side, own: bool, space: Workspace
) -> tuple[Tensor | None, Tensor | None]:
    """Return which pairs of a tile are positives, and which are masked.

    Args:
        rows, columns: the sides, as :func:`comparable` returns them.
        own: whether the diagonal holds the rows' own positives.

    Returns:
        ``positive`` [m, n], 1 or 0; ``None`` if there are no groups: then only the diagonal is
        positive. ``excluded`` [m, n], greater than 0 for masked pairs; ``None`` if there are none.
        Both are floats in the workspace, which are several times faster than bools.
    """
    shape = (len(rows), len(columns))
    positive = None
    if rows.group_ids is not None and columns.group_ids is not None:
        positive = space.tile("positive", *shape)
        torch.eq(rows.group_ids[:, None], columns.group_ids, out=positive)
    excluded = None
    for comparison, row_ids, column_ids in _clashes(rows, columns):
        clash = space.tile("scratch" if excluded is not None else "excluded", *shape)
        comparison(row_ids[:, None], column_ids, out=clash)
        excluded = clash if excluded is None else excluded.add_(clash)
    if excluded is not None and positive is not None:
        excluded.addcmul_(excluded, positive, value=-1)
    elif excluded is not None and own:
        excluded.fill_diagonal_(0)
    return positive, excluded


def _clashes(rows: Side, columns: Side) -> Iterator[tuple]:
    """Yield what masks a pair: (comparison, row ids, column ids).

    A pair is masked if the domains differ, or if any text of one row equals any of the other.
    """
    if rows.domain_ids is not None:
        yield torch.ne, rows.domain_ids, columns.domain_ids
    for row_ids in (rows.anchor_ids, rows.text_ids):
        for column_ids in (columns.anchor_ids, columns.text_ids):
            if row_ids is not None and column_ids is not None:
                yield torch.eq, row_ids, column_ids
