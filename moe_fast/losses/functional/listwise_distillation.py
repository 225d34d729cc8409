"""listwise_distillation: a teacher's scores of a query's passages, learned against the whole batch.

B queries have C passages each, N = B * C in all; passage i of query r has the teacher's share
``t_ri = softmax(teacher_r)_i`` and the student's logit ``s_ri = scale * sim(a_r, p_ri)``. With the
passages of all other queries as further candidates,

    loss = mean_r sum_i t_ri * ( log( sum over j >= i of exp(s_rj)
                                      + sum over the others' passages of exp(s) ) - s_ri )

so that passage i competes with the batch, but not with the passages 0 .. i - 1 of its own row.
:func:`moe_fast.losses.functional.distillation` compares a query's own passages alone.

The sums over j >= i are running sums of the C own logits, and the sum over others' passages is the
same for every i: one pass over the [B, N] logits, in blocks of rows that the backward pass computes
again, so that they are never held as a whole.

Source: FlagEmbedding's ``m3_kd_loss``, of Chen et al., arXiv 2402.03216, with which Yu, arXiv
2412.17364, trains.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.losses.functional.row_blocks import sum_over_row_blocks
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_choice,
    check_dtype,
    check_shape,
    checks_values,
    compute_dtype,
)
from moe_fast.ops.info_nce.arguments import SIMILARITIES
from moe_fast.ops.info_nce.tiles import MASKED


def listwise_distillation(
    a: Tensor,
    passages: Tensor,
    teacher_logits: Tensor,
    *,
    scale: float | Tensor,
    similarity: str = "cosine",
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    domain_ids: Tensor | None = None,
) -> Tensor:
    """Compute the mean over B queries; see the module's docstring for the mathematics.

    Args:
        a: [B, d], the queries.
        passages: [B, C, d], each query's own.
        teacher_logits: [B, C] float, finite, divided by the teacher's temperature; no gradient.
        scale: 1 / temperature.
        similarity: "cosine" or "dot".
        row_ids, col_ids: [B] and [B, C] int64, ids of the texts: another query's passage with the
            text of the query or of one of its own passages is no candidate. ``None``: all are.
        domain_ids: [B] int64; only passages of queries of the same domain are candidates.

    Returns:
        [] float32 (float64 for float64 embeddings).

    Raises:
        ValueError: a shape does not fit, or (if values are checked) a teacher's score is NaN or
            infinite.
        TypeError: a dtype does not fit.
    """
    _check(a, passages, teacher_logits, similarity, row_ids, col_ids, domain_ids)
    dtype = compute_dtype(a.dtype)
    with torch.autocast(a.device.type, enabled=False):
        queries, keys = a.to(dtype), passages.to(dtype)
        if similarity == "cosine":
            queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
        shares = teacher_logits.detach().to(dtype).softmax(1)
        count, columns = passages.shape[0], passages.shape[0] * passages.shape[1]
        everyone = keys.flatten(0, 1)

        def of_rows(first: int, last: int) -> Tensor:
            rows = slice(first, last)
            excluded = _excluded(rows, passages.shape[:2], row_ids, col_ids, domain_ids, a.device)
            logits = (scale * (queries[rows] @ everyone.t())).masked_fill(excluded, MASKED)
            others = logits.logsumexp(1, keepdim=True)
            own = scale * (queries[rows, None] * keys[rows]).sum(-1)  # [rows, C]
            later = own.flip(1).logcumsumexp(1).flip(1)  # over j >= i
            return (shares[rows] * (torch.logaddexp(later, others) - own)).sum()

        return sum_over_row_blocks(of_rows, count, columns) / count


def _excluded(
    rows: slice,
    sizes: torch.Size,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    device: torch.device,
) -> Tensor:
    """[rows, B * C] bool: a row's own passages, its texts, and those of other domains."""
    batch, own = sizes
    owner = torch.arange(batch, device=device)
    excluded = owner[rows, None] == owner  # [rows, B]
    if domain_ids is not None:
        excluded = excluded | (domain_ids[rows, None] != domain_ids)
    excluded = excluded.repeat_interleave(own, 1)
    if col_ids is not None:
        everyone = col_ids.flatten()
        for ids in col_ids[rows].unbind(1) + (() if row_ids is None else (row_ids[rows],)):
            excluded = excluded | (ids[:, None] == everyone)
    return excluded


def _check(
    a: Tensor,
    passages: Tensor,
    teacher_logits: Tensor,
    similarity: str,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
) -> None:
    check_choice("similarity", similarity, SIMILARITIES)
    check_dtype("a", a, FLOAT_DTYPES)
    check_shape("a", a, (None, None), "[B, d]")
    check_dtype("passages", passages, (a.dtype,))
    check_shape("passages", passages, (a.shape[0], None, a.shape[1]), "[B, C, d]")
    if not (passages.shape[0] and passages.shape[1]):
        raise ValueError(f"passages must hold at least one per row; got {list(passages.shape)}.")
    check_dtype("teacher_logits", teacher_logits, FLOAT_DTYPES)
    check_shape("teacher_logits", teacher_logits, tuple(passages.shape[:2]), "[B, C]")
    if checks_values(teacher_logits.device) and not teacher_logits.isfinite().all():
        row = int((~teacher_logits.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"teacher_logits must be finite; got {teacher_logits[row].tolist()} in row {row}."
        )
    if row_ids is not None and col_ids is None:
        raise ValueError("col_ids must be given with row_ids; got None.")
    for name, ids, shape in (
        ("row_ids", row_ids, (a.shape[0],)),
        ("col_ids", col_ids, tuple(passages.shape[:2])),
        ("domain_ids", domain_ids, (a.shape[0],)),
    ):
        if ids is not None:
            check_dtype(name, ids, INTEGER_DTYPES)
            check_shape(name, ids, shape, "[B, C]" if name == "col_ids" else "[B]")
