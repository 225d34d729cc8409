"""info_nce in PyTorch, with the whole matrix of logits in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import without_autocast
from moe_fast.ops.eager_dispatch import Operation
from moe_fast.ops.info_nce.arguments import check_scale, queries_and_keys, row_weights
from moe_fast.ops.info_nce.tiles import check_finite


def positives_and_candidates(
    batch: int,
    num_candidates: int,
    device: torch.device,
    ids: Sequence[Tensor | None],
    first: int = 0,
    last: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return two bool matrices [B, N], or their rows ``first`` to ``last - 1``.

    The first is True if j is a positive of i, the second if j takes part in i's softmax. ``ids``
    are those of rows, columns, domains and groups, or ``None``.
    """
    row_ids, col_ids, domain_ids, group_ids = ids
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


def _directions(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Sequence[Tensor | None],
    label_smoothing: float,
    symmetric: bool,
) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Return (logits, positive, candidate, softmax - target, loss) of a to b, then of b to a."""
    batch = q.shape[0]
    logits = scale * (q @ k.t())
    positive, candidate = positives_and_candidates(batch, k.shape[0], q.device, ids)
    views = [(logits, positive, candidate)]
    if symmetric:
        views.append((logits[:, :batch].t(), positive[:, :batch].t(), candidate[:, :batch].t()))
    result = []
    for s, positives, candidates in views:
        target = positives.to(q.dtype) / positives.sum(1, keepdim=True)
        if label_smoothing:
            evenly = candidates.to(q.dtype) / candidates.sum(1, keepdim=True)
            target = (1 - label_smoothing) * target + label_smoothing * evenly
        log_p = s.masked_fill(~candidates, -torch.inf).log_softmax(1)
        loss = -torch.where(target > 0, target * log_p, 0).sum(1)
        result.append((s, positives, candidates, log_p.exp() - target, loss))
    return result


@without_autocast
def _info_nce(
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
    directions = _directions(q, k, scale, ids, label_smoothing, symmetric)
    row_loss = torch.stack([d[-1] for d in directions]).mean(0)
    logits, positive, candidate = directions[0][:3]
    # "not smaller" instead of "larger or equal": a NaN then counts as an error, like a tie
    beats = candidate & ~positive & ~(logits < logits.diagonal()[:, None])
    return (each * row_loss).sum(), row_loss, 1 + beats.sum(1)


def _fake(q, *rest):
    batch = q.shape[0]
    return q.new_empty(()), q.new_empty((batch,)), q.new_empty((batch,), dtype=torch.int64)


@without_autocast
def _info_nce_backward(grad_loss, q, k, scale, *rest):
    *ids, weights, label_smoothing, symmetric = rest
    each = row_weights(weights, q)
    directions = _directions(q, k, scale, ids, label_smoothing, symmetric)
    grad = each[:, None] * directions[0][3]  # [B, N], row-wise softmax minus target
    if symmetric:
        grad[:, : q.shape[0]] += (each[:, None] * directions[1][3]).t()
    grad *= grad_loss / len(directions)
    return scale * (grad @ k), scale * (grad.t() @ q), (grad * (q @ k.t())).sum()


def _fake_backward(grad_loss, q, k, scale, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), scale.new_empty(())


_OPERATION = Operation(_info_nce, _fake, _fake_backward, differentiable=3)
_run_op = _OPERATION.implement("info_nce", _info_nce, _info_nce_backward)


def _run(a, b, negatives, scale, *rest):
    check_finite(a=a, b=b, negatives=negatives)  # before they are normalised
    q, k = queries_and_keys(a, b, negatives, "cosine" if rest[-1] else "dot")
    return _run_op(q, k, scale, *rest[:-1])


backends.register("info_nce", "torch", _run)
