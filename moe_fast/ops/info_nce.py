"""info_nce: the contrastive loss with in-batch negatives (multiple negatives ranking), dense form.

With ``q = a`` and ``k = [b; negatives]`` (normalised to unit length for cosine similarity):

    s_ij = scale * <q_i, k_j>                                   [B, N], N = B + B * G
    row_i = cross_entropy(s_i. , T_i.)       a to b, over all N candidates
    col_j = cross_entropy(s_.j , T'_.j)      b to a, over the B anchors, j < B
    loss  = sum_i w_i * (row_i + col_i) / 2 / sum_i w_i          (one-way: w_i * row_i)

Targets: the row's own positive, or, with ``group_ids``, evenly all rows of its group (as the outer
form of SupCon, Khosla et al., arXiv 2004.11362); with ``label_smoothing`` eps, ``(1 - eps)`` of
that plus eps spread evenly over the candidates that are not masked.

Masks: a pair (i, j) is left out of both directions, unless j is a positive of i, when

    - the rows i and j (j < B) share a text: the same anchor, the same positive, or one's anchor is
      the other's positive; or a hard negative j is the same text as i's anchor or positive;
    - ``domain_ids`` of the rows differ (a hard negative has the domain of its row).

Backward, with P and P' the row- and column-wise softmax and g the upstream gradient:

    G = g / sum(w) * (w_i (P - T) + w_j (P' - T')) / 2
    dq = scale * G . k;  dk = scale * G^T . q;  dscale = sum(G * <q, k>)

The products and the logits are at least float32 whatever the inputs are, with autocast off.

Source: Henderson et al., arXiv 1705.00652 (in-batch negatives); van den Oord et al., arXiv
1807.03748 (InfoNCE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_choice,
    check_dtype,
    check_like,
    check_shape,
    checks_values,
    compute_dtype,
    without_autocast,
)
from moe_fast.ops.logit_tiles import check_finite, inverse_norm

SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class InfoNCEStats:
    """What one pass of the loss also knows; detached, for logs and for choosing rows.

    Attributes:
        row_loss: [B] float, each row's loss (the mean of both directions where symmetric).
        rank: [B] int64, 1 + the number of unmasked candidates, positives aside, at least as
            similar to the anchor as its own positive: 1 is best, ties count against the row.
        accuracy: [] float, the share of rows with rank 1.
    """

    row_loss: Tensor
    rank: Tensor
    accuracy: Tensor


def info_nce(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None = None,
    *,
    scale: float | Tensor,
    similarity: str = "cosine",
    symmetric: bool = True,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    domain_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """The contrastive loss of B pairs; see the module's docstring for the mathematics.

    Args:
        a: [B, d] anchors, B >= 1.
        b: [B, d] positives, row i belonging to ``a[i]``.
        negatives: [B * G, d] hard negatives, row i's being ``i * G .. i * G + G - 1``.
        scale: 1 / temperature, > 0; a float, or a tensor of one element that wants a gradient.
        similarity: "cosine" or "dot".
        symmetric: the mean of both directions, or a to b only.
        row_ids, col_ids: int64 [B] and [N], equal where texts are (hashes of anchors, and of
            positives followed by hard negatives): the same text is never its own negative.
        domain_ids: int64 [B]; negatives come from the same domain only.
        group_ids: int64 [B]; rows of one group are each other's positives.
        weights: float [B], >= 0, not all 0.
        label_smoothing: in [0, 1).
        return_stats: also return an :class:`InfoNCEStats`, at no extra pass.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        The loss, [] float32 (float64 for float64 inputs), or ``(loss, stats)``. Gradients reach
        ``a``, ``b``, ``negatives`` and ``scale``, not ``weights``.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values that do not fit.
    """
    ids = {"row_ids": row_ids, "domain_ids": domain_ids, "group_ids": group_ids}
    check_arguments(a, b, negatives, similarity, label_smoothing, weights, col_ids, **ids)
    check_not_alone(a, negatives)
    dtype = compute_dtype(a.dtype)
    scale = as_scale(scale, a.device, dtype)
    run = backends.select("info_nce", backend, a.device, dtype)
    loss, row_loss, rank = run(
        *(a, b, negatives, scale, row_ids, col_ids, domain_ids, group_ids, weights),
        *(label_smoothing, symmetric, similarity == "cosine"),
    )
    if not return_stats:
        return loss
    row_loss = row_loss.detach()
    return loss, InfoNCEStats(row_loss, rank, (rank == 1).to(row_loss.dtype).mean())


def check_arguments(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None,
    similarity: str,
    label_smoothing: float,
    weights: Tensor | None,
    col_ids: Tensor | None,
    **row_values: Tensor | None,
) -> None:
    """Raise unless the arguments are those that :func:`info_nce` asks for, negatives aside."""
    check_choice("similarity", similarity, SIMILARITIES)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing}.")
    check_pairs(a, b, negatives, weights, col_ids, **row_values)


def check_not_alone(a: Tensor, negatives: Tensor | None) -> None:
    """Raise ``ValueError`` for one pair without negatives."""
    if a.shape[0] == 1 and (negatives is None or negatives.shape[0] == 0):
        raise ValueError(
            "info_nce needs negatives: one pair alone has none and a loss of 0 whatever its "
            "embeddings are; got B = 1 and no hard negatives. Give hard negatives or more pairs, "
            "or drop a last batch of one row (dataloader_drop_last=True)."
        )


def queries_and_keys(
    a: Tensor, b: Tensor, negatives: Tensor | None, similarity: str
) -> tuple[Tensor, Tensor]:
    """q [B, d] and k [N, d], whose products are the similarities, in at least float32."""
    dtype = compute_dtype(a.dtype)
    candidates = b if negatives is None else torch.cat((b, negatives))
    q, k = a.to(dtype), candidates.to(dtype)
    if similarity == "cosine":
        q, k = (x * inverse_norm(x)[:, None] for x in (q, k))
    return q, k


def as_scale(scale: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``scale`` as a [] tensor, or an error for a number that is no 1 / temperature."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            raise ValueError(f"scale must have one element; got shape {list(scale.shape)}.")
        return scale.reshape(()).to(device=device, dtype=dtype)
    if not isinstance(scale, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"scale must be a number or a tensor; got {scale!r}.")
    if not 0 < scale < math.inf:
        raise ValueError(
            f"scale must be greater than 0 and finite (it is 1 / temperature); got {scale}."
        )
    return torch.full((), scale, device=device, dtype=dtype)


def row_weights(weights: Tensor | None, a: Tensor) -> Tensor:
    """[B], summing to 1, in the dtype of the logits of anchors ``a``."""
    dtype = compute_dtype(a.dtype)
    if weights is None:
        return a.new_full((a.shape[0],), 1 / a.shape[0], dtype=dtype)
    weights = weights.to(dtype)
    if not check_weights(weights):
        raise ValueError(f"weights must be >= 0 and not all 0; got {weights.tolist()}.")
    return weights / weights.sum()


def check_weights(weights: Tensor | None) -> bool:
    """Whether any row has a weight; a ``ValueError`` for one that is negative, NaN or infinite.

    Where values are not checked, or there are no weights, every row counts as having one.
    """
    if weights is None or not checks_values(weights.device):
        return True
    if not ((weights >= 0).all() and weights.sum().isfinite()):
        raise ValueError(f"weights must be >= 0 and finite; got {weights.tolist()}.")
    return bool(weights.any())


def check_scale(scale: Tensor) -> None:
    """Raise ``ValueError`` for a scale [] that is no 1 / temperature, where values are read."""
    if checks_values(scale.device) and not 0 < scale.item() < math.inf:
        raise ValueError(f"scale must be greater than 0 and finite; got {scale.item()}.")


def check_pairs(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None,
    weights: Tensor | None,
    col_ids: Tensor | None,
    **row_values: Tensor | None,
) -> None:
    """Raise unless shapes, dtypes and devices are those that :func:`info_nce` asks for."""
    check_dtype("a", a, FLOAT_DTYPES)
    check_shape("a", a, (None, None), "[B, d]")
    batch, dim = a.shape
    if batch == 0:
        raise ValueError("a must hold at least one row: the mean over no rows is undefined.")
    check_shape("b", b, (batch, dim), "[B, d]")
    num_candidates = batch
    if negatives is not None:
        check_shape("negatives", negatives, (None, dim), "[B * G, d]")
        if negatives.shape[0] % batch:
            raise ValueError(
                f"negatives must hold G rows for each of the B = {batch} anchors; "
                f"got {negatives.shape[0]} rows."
            )
        num_candidates += negatives.shape[0]
    check_like("a", a, b=b, negatives=negatives)
    if (row_values.get("row_ids") is None) != (col_ids is None):
        given, missing = ("row_ids", "col_ids") if col_ids is None else ("col_ids", "row_ids")
        raise ValueError(f"row_ids and col_ids go together; got {given} without {missing}.")
    for name, values in row_values.items():
        if values is not None:
            check_shape(name, values, (batch,), "[B]")
    if col_ids is not None:
        check_shape("col_ids", col_ids, (num_candidates,), "[B + B * G]")
    for name, values in {**row_values, "col_ids": col_ids}.items():
        if values is not None:
            check_dtype(name, values, INTEGER_DTYPES)
    if weights is not None:
        check_shape("weights", weights, (batch,), "[B]")
        check_dtype("weights", weights, FLOAT_DTYPES)
    check_like("a", a, dtype=False, weights=weights, col_ids=col_ids, **row_values)


# --- the reference -------------------------------------------------------------------------------


def positives_and_candidates(
    batch: int,
    num_candidates: int,
    device: torch.device,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    group_ids: Tensor | None,
    first: int = 0,
    last: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Two bool matrices [B, N], or their rows ``first`` to ``last``.

    j is a positive of i; j takes part in i's softmax.
    """
    row = torch.arange(batch, device=device)
    here = slice(first, last)
    num_negatives = (num_candidates - batch) // batch
    row_of_candidate = torch.cat((row, row.repeat_interleave(num_negatives)))  # [N]
    own = torch.arange(num_candidates, device=device) == row[here, None]
    positive = own
    if group_ids is not None:
        positive = own.clone()
        positive[:, :batch] |= group_ids[here, None] == group_ids
    masked = torch.zeros_like(own)
    if row_ids is not None and col_ids is not None:
        masked |= (col_ids == row_ids[here, None]) | (col_ids == col_ids[:batch][here, None])
        masked[:, :batch] |= row_ids == row_ids[here, None]
        masked[:, :batch] |= row_ids == col_ids[:batch][here, None]
    if domain_ids is not None:
        masked |= domain_ids[here, None] != domain_ids[row_of_candidate]
    return positive, positive | ~masked


def _targets(positive: Tensor, candidate: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """[B, N] target distribution of each row; rows sum to 1."""
    target = positive.to(dtype) / positive.sum(1, keepdim=True)
    if eps:
        target = (1 - eps) * target + eps * candidate.to(dtype) / candidate.sum(1, keepdim=True)
    return target


def _cross_entropy(logits: Tensor, candidate: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise cross entropy [B] and softmax [B, N] over the candidates."""
    log_p = logits.masked_fill(~candidate, -torch.inf).log_softmax(1)
    return -torch.where(target > 0, target * log_p, 0).sum(1), log_p.exp()


def _directions(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    group_ids: Tensor | None,
    label_smoothing: float,
    symmetric: bool,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """(logits, positive, candidate, softmax - target, loss) of a to b, then of b to a."""
    batch = q.shape[0]
    logits = scale * (q @ k.t())
    positive, candidate = positives_and_candidates(
        batch, k.shape[0], q.device, row_ids, col_ids, domain_ids, group_ids
    )
    views = [(logits, positive, candidate)]
    if symmetric:
        views.append((logits[:, :batch].t(), positive[:, :batch].t(), candidate[:, :batch].t()))
    result = []
    for view in views:
        target = _targets(view[1], view[2], label_smoothing, q.dtype)
        loss, p = _cross_entropy(view[0], view[2], target)
        result.append((*view, p - target, loss))
    return result


@torch.library.custom_op("moe_fast::info_nce", mutates_args=())
@without_autocast
def _info_nce_op(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    group_ids: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_scale(scale)
    check_finite(a=q, b=k[: len(q)], negatives=k[len(q) :])
    each = row_weights(weights, q)
    ids = (row_ids, col_ids, domain_ids, group_ids)
    directions = _directions(q, k, scale, *ids, label_smoothing, symmetric)
    row_loss = torch.stack([d[-1] for d in directions]).mean(0)
    logits, positive, candidate = directions[0][:3]
    # "not smaller", so that NaN counts against the row as a tie does
    beats = candidate & ~positive & ~(logits < logits.diagonal()[:, None])
    return (each * row_loss).sum(), row_loss, 1 + beats.sum(1)


@_info_nce_op.register_fake
def _(q, *rest):
    batch = q.shape[0]
    return q.new_empty(()), q.new_empty((batch,)), q.new_empty((batch,), dtype=torch.int64)


@torch.library.custom_op("moe_fast::info_nce_backward", mutates_args=())
@without_autocast
def _info_nce_backward_op(
    grad_loss: Tensor,
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    group_ids: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    each = row_weights(weights, q)
    ids = (row_ids, col_ids, domain_ids, group_ids)
    directions = _directions(q, k, scale, *ids, label_smoothing, symmetric)
    grad = each[:, None] * directions[0][3]  # [B, N], row-wise softmax minus target
    if symmetric:
        grad[:, : q.shape[0]] += (each[:, None] * directions[1][3]).t()
    grad *= grad_loss / len(directions)
    return scale * (grad @ k), scale * (grad.t() @ q), (grad * (q @ k.t())).sum()


@_info_nce_backward_op.register_fake
def _(grad_loss, q, k, scale, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), scale.new_empty(())


def _save_for_backward(ctx, inputs, output):
    *tensors, label_smoothing, symmetric = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (label_smoothing, symmetric)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, _row_loss, _rank):
    grads = _info_nce_backward_op(grad_loss, *ctx.saved_tensors, *ctx.settings)
    return *grads, *[None] * 7


_info_nce_op.register_autograd(_backward, setup_context=_save_for_backward)


def _run(a, b, negatives, scale, *rest):
    check_finite(a=a, b=b, negatives=negatives)  # the op sees unit vectors, whatever these are
    q, k = queries_and_keys(a, b, negatives, "cosine" if rest[-1] else "dot")
    return _info_nce_op(q, k, scale, *rest[:-1])


backends.register("info_nce", "torch", _run)
