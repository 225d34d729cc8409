"""sigmoid_loss: classifies each pair of an anchor and a candidate as positive or negative.

With anchors q = a [B, d], candidates k = [b; negatives], N = B + B * G of them, and z_ij = 1 if
candidate j is a positive of anchor i, else -1:

    loss = -1/B sum_i sum_j log sigmoid(z_ij * (scale * <q_i, k_j> + bias))

There is no softmax, so the gradient of a pair does not depend on other candidates. Nearly all pairs
are negative, which is why the bias starts at -10. Pairs that are masked (see
:mod:`moe_fast.ops.info_nce`) are left out of the sum. The sum over rows is the only direction. The
loss is computed in blocks of rows; the matrix is never held as a whole.

Source: Zhai et al. (SigLIP), arXiv 2303.15343. Its initial values are scale = 10, learned as its
logarithm, and bias = -10.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.losses.functional.accuracy import in_batch_accuracy
from moe_fast.losses.functional.row_blocks import sum_over_row_blocks
from moe_fast.losses.functional.scale_and_bias import checked_bias, checked_scale
from moe_fast.ops.checks import check_choice
from moe_fast.ops.info_nce.arguments import (
    SIMILARITIES,
    check_pairs,
    queries_and_keys,
)
from moe_fast.ops.info_nce.reference import positives_and_candidates
from moe_fast.ops.info_nce.tiles import check_finite


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    negatives: Tensor | None = None,
    *,
    scale: float | Tensor,
    bias: float | Tensor,
    similarity: str = "cosine",
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    domain_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Compute the sigmoid loss of B pairs; see the module's docstring for the mathematics.

    Args:
        a, b, negatives: [B, d], [B, d], [B * G, d] as in :func:`moe_fast.ops.info_nce`.
        scale: > 0; a float, or a tensor of one element, which gets a gradient.
        bias: of any sign; a float, or a tensor of one element, which gets a gradient.
        similarity, row_ids, col_ids, domain_ids, group_ids: as in :func:`moe_fast.ops.info_nce`.
        return_metrics: whether to return ``in_batch_accuracy`` too, detached and [].

    Returns:
        The loss, [] float32 (float64 for float64 inputs), or ``(loss, metrics)``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    ids = {"row_ids": row_ids, "domain_ids": domain_ids, "group_ids": group_ids}
    check_pairs(a, b, negatives, None, col_ids, **ids)
    check_finite(a=a, b=b, negatives=negatives)
    q, k = queries_and_keys(a, b, negatives, similarity)
    scale, bias = checked_scale(scale, q), checked_bias(bias, q)

    def loss_and_hits(first: int, last: int) -> Tensor:
        """Return [2]: the loss and the correct rows, summed over the rows of a block."""
        positive, candidate = positives_and_candidates(
            len(q), len(k), q.device, (row_ids, col_ids, domain_ids, group_ids), first, last
        )
        with torch.autocast(q.device.type, enabled=False):
            logits = scale * (q[first:last] @ k.t()) + bias
            terms = -F.logsigmoid(torch.where(positive, logits, -logits))
            hits = in_batch_accuracy(logits, positive, candidate, first) * (last - first)
            return torch.stack((torch.where(candidate, terms, 0).sum(), hits))

    loss, hits = (sum_over_row_blocks(loss_and_hits, len(q), len(k)) / len(q)).unbind()
    return (loss, {"in_batch_accuracy": hits.detach()}) if return_metrics else loss
