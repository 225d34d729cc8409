"""mnr_plus: multiple negatives ranking whose targets come from the batch itself.

With ``L = scale * a b^T`` and ``S = (a a^T + b b^T) / (2 scale)``, both [B, B]:

    target of row i     argmax_j S_ij
    target of column j  argmax_i (S_ij - logsumexp_k S_ik)
    loss = (mean_i cross_entropy(L_i. , row target) + mean_j cross_entropy(L_.j, column target)) / 2

Here a [B, d] are the anchors, b [B, d] the positives. The embeddings are not normalised, so a
row's target may be another row with a larger norm. For a column's target, too, the logsumexp runs
over row i of S; the two directions therefore have different targets.

For embeddings of length 1, ``S_ij <= S_ii``, so every row's target is its own positive. So is every
column's, unless row j has many near neighbours and some other row i has few, such that
``logsumexp_j - logsumexp_i > S_jj - S_ij``. Except for such columns the loss equals the symmetric
:func:`moe_fast.ops.info_nce` with dot products.

The matrices are computed in blocks of rows and are never held in memory as a whole.

Source: Hallee et al., arXiv 2401.15713, and its code, whose older form learns ``1 / scale``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.losses.functional.accuracy import in_batch_accuracy
from moe_fast.losses.functional.row_blocks import map_row_blocks, sum_over_row_blocks
from moe_fast.losses.functional.scale_and_bias import checked_scale
from moe_fast.ops.checks import check_choice
from moe_fast.ops.info_nce.arguments import SIMILARITIES, check_pairs, queries_and_keys
from moe_fast.ops.info_nce.tiles import check_finite


def mnr_plus(
    a: Tensor,
    b: Tensor,
    *,
    scale: float | Tensor = 1.0,
    similarity: str = "dot",
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of B pairs; see the module's docstring for the mathematics.

    Args:
        a, b: [B, d], B >= 1; row i of one belongs to row i of the other.
        scale: 1 / temperature, > 0; a float, or a tensor of one element, which gets a gradient (of
            the logits; the choice of targets has none).
        similarity: "dot", or "cosine" to normalise ``a`` and ``b`` first.
        return_metrics: whether to return metrics too, detached and []: ``in_batch_accuracy``, and
            ``own_targets``, the share of rows and columns whose target is their own row.

    Returns:
        The loss, [] float32 (float64 for float64 inputs), or ``(loss, metrics)``.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values do not fit.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    check_pairs(a, b, None, None, None)
    check_finite(a=a, b=b)
    q, k = queries_and_keys(a, b, None, similarity)
    scale = checked_scale(scale, q)
    row_target, column_target = _targets(q, k, scale)
    rows = _cross_entropy(q, k, scale, row_target)
    columns = _cross_entropy(k, q, scale, column_target)
    loss = (rows[0] + columns[0]) / 2
    if not return_metrics:
        return loss
    own = torch.arange(len(q), device=q.device)
    own_targets = torch.stack([row_target == own, column_target == own]).to(q.dtype).mean()
    return loss, {"in_batch_accuracy": rows[1].detach(), "own_targets": own_targets}


def _cross_entropy(q: Tensor, k: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Return [2]: the mean cross entropy of the rows of ``scale * q k^T``, and their accuracy."""

    def loss_and_hits(first: int, last: int) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            logits = scale * (q[first:last] @ k.t())
            loss = F.cross_entropy(logits, target[first:last], reduction="sum")
        every = torch.ones_like(logits, dtype=torch.bool)
        own = torch.zeros_like(every)
        own[:, first:last].fill_diagonal_(True)
        hits = in_batch_accuracy(logits, own, every, first) * (last - first)
        return torch.stack((loss, hits))

    return sum_over_row_blocks(loss_and_hits, len(q), len(k)) / len(q)


@torch.no_grad()
def _targets(q: Tensor, k: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows' targets among the columns, and the columns' among the rows, [B] int64 each.

    S is symmetric. So the target of a column j is the argmax of row j of S, after the logsumexp of
    each row i has been subtracted from column i.
    """
    both = torch.cat((q, k), dim=1)

    def block(first: int, last: int) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return both[first:last] @ both.t() / (2 * scale)

    log_sum = torch.cat(map_row_blocks(lambda *at: block(*at).logsumexp(1), len(q), len(k)))
    by_row = map_row_blocks(lambda *at: block(*at).argmax(1), len(q), len(k))
    by_column = map_row_blocks(lambda *at: (block(*at) - log_sum).argmax(1), len(q), len(k))
    return torch.cat(by_row), torch.cat(by_column)
