"""info_nce: the contrastive loss with in-batch negatives (multiple negatives ranking).

With ``q = a`` and ``k = [b; negatives]``:

    s_ij = scale * <q_i, k_j>                                   [B, N], N = B + B * G
    row_i = cross_entropy(s_i. , T_i.)       a to b, over all N candidates
    col_j = cross_entropy(s_.j , T'_.j)      b to a, over the B anchors, j < B
    loss  = sum_i w_i * (row_i + col_i) / 2 / sum_i w_i          (one-way: w_i * row_i)

a [B, d] are the anchors, b [B, d] their positives, negatives [B * G, d] G hard negatives per row;
w are the weights of rows. For cosine similarity all are first normalised to unit length.

Targets T: the row's own positive or, with ``group_ids``, all rows of its group with equal shares
(the outer form of SupCon, Khosla et al., arXiv 2004.11362). With ``label_smoothing`` eps, the
target is ``(1 - eps)`` times that, plus eps spread evenly over the candidates that are not masked.

Masks: a pair (i, j) is left out of both directions, unless j is a positive of i, if

    - the rows i and j (j < B) share a text: the same anchor, the same positive, or one's anchor is
      the other's positive; or a hard negative j is the same text as i's anchor or positive;
    - ``domain_ids`` of the rows differ (a hard negative has the domain of its row).

Backward, with P and P' the row- and column-wise softmax and g the upstream gradient:

    G = g / sum(w) * (w_i (P - T) + w_j (P' - T')) / 2
    dq = scale * G . k;  dk = scale * G^T . q;  dscale = sum(G * <q, k>)

Products and logits are computed in at least float32, whatever the inputs are, with autocast off.

Source: Henderson et al., arXiv 1705.00652 (in-batch negatives); van den Oord et al., arXiv
1807.03748 (InfoNCE).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import compute_dtype, wants_gradients
from moe_fast.ops.info_nce import cpp, reference, tiled, triton  # noqa: F401 - register themselves
from moe_fast.ops.info_nce.arguments import as_scale, check_arguments, check_not_alone


@dataclass(frozen=True)
class InfoNCEStats:
    """Statistics from the loss's forward pass; detached, for logs and for choosing rows.

    Attributes:
        row_loss: [B] float, each row's loss (if symmetric, the mean of both directions).
        rank: [B] int64, the rank of the row's own positive; 1 is best. It is 1 + the number of
            candidates, without masked ones and other positives, that are at least as similar to the
            anchor; so ties count against the row.
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
    """Compute the contrastive loss of B pairs; see the module's docstring for the mathematics.

    Args:
        a: [B, d] anchors, B >= 1.
        b: [B, d] positives; ``b[i]`` belongs to ``a[i]``.
        negatives: [B * G, d] hard negatives; those of row i are ``i * G .. i * G + G - 1``.
        scale: 1 / temperature, > 0; a float, or a tensor of one element, which gets a gradient.
        similarity: "cosine" or "dot".
        symmetric: take the mean of both directions; False: a to b only.
        row_ids, col_ids: integers [B] and [N] that are equal for equal texts (hashes of anchors,
            and of positives followed by hard negatives): a text is never its own negative. Give
            both or neither.
        domain_ids: integers [B]; negatives come from the same domain only.
        group_ids: integers [B]; rows of one group are each other's positives.
        weights: float [B], >= 0, not all 0.
        label_smoothing: in [0, 1).
        return_stats: whether to return an :class:`InfoNCEStats` too; needs no extra pass.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        The loss, [] float32 (float64 for float64 inputs), or ``(loss, stats)``. Gradients reach
        ``a``, ``b``, ``negatives`` and ``scale``, not ``weights``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit; a single pair without
            hard negatives is a ``ValueError``.
    """
    learned = scale if isinstance(scale, Tensor) else None
    dtype, run = _prepare(
        *(a, b, negatives, learned, row_ids, col_ids, domain_ids, group_ids, weights),
        *(label_smoothing, similarity, backend),
    )
    scale = as_scale(scale, a.device, dtype)
    loss, row_loss, rank = run(
        *(a, b, negatives, scale, row_ids, col_ids, domain_ids, group_ids, weights),
        *(label_smoothing, symmetric, similarity == "cosine"),
    )
    if not return_stats:
        return loss
    row_loss = row_loss.detach()
    return loss, InfoNCEStats(row_loss, rank, (rank == 1).to(row_loss.dtype).mean())


@once_per_signature
def _prepare(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None,
    learned_scale: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    domain_ids: Tensor | None,
    group_ids: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    similarity: str,
    backend: str | None,
) -> tuple[torch.dtype, Callable]:
    """Check the arguments; return the dtype of the logits, and who computes."""
    ids = {"row_ids": row_ids, "domain_ids": domain_ids, "group_ids": group_ids}
    check_arguments(a, b, negatives, similarity, label_smoothing, weights, col_ids, **ids)
    check_not_alone(a, negatives)
    dtype = compute_dtype(a.dtype)
    needs_grad = wants_gradients(a, b, negatives, learned_scale)
    return dtype, backends.select("info_nce", backend, a.device, dtype, gradients=needs_grad)
