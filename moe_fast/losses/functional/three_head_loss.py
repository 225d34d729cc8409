"""three_head_loss: the losses of three scores and of their sum, and the sum as a teacher.

With the dense, sparse and multi-vector scores s_d, s_s, s_m [B, N] of B queries against N
candidates, and the temperature tau:

    s_c = w_d s_d + w_s s_s + w_m s_m                            the combined score
    L_h = mean_i cross_entropy(s_h[i] / tau, the query's own positive)
    L   = (L_d + L_c + 0.1 L_s + L_m) / 4

Self-distillation takes t = softmax(s_c / tau), without a gradient, as the targets of each head:

    L'_h = mean_i - sum_j t_ij log softmax(s_h / tau)_ij
    L   <- (L + (L'_d + 0.1 L'_s + L'_m) / 3) / 2

With a teacher's scores of each query's own G passages, targets t = softmax(teacher), the loss of a
head is listwise instead: the sum over i = 0 .. G - 1 of t_i times the cross entropy of passage i
against all candidates but the row's own passages 0 .. i - 1.

Source: Chen et al., arXiv 2402.03216, and the weights of FlagEmbedding's training code; the
listwise form: FlagEmbedding's ``m3_kd_loss``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS = ("dense", "sparse", "multi_vector")


def combined_scores(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of the heads' scores."""
    return sum(w * s for w, s in zip(weights[1:], scores[1:], strict=True)) + weights[0] * scores[0]


def three_head_loss(
    scores: Sequence[Tensor],
    own: Tensor,
    excluded: Tensor,
    *,
    scale: float | Tensor,
    score_weights: Sequence[float],
    sparse_weight: float,
    distils: bool,
    teacher: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each row.

    Args:
        scores: of the dense, sparse and multi-vector head, each [B, N].
        own: [B, G] int64, the places of each query's own passages among the candidates, the
            positive first.
        excluded: [B, N] bool, candidates that are no negatives of a query.
        scale: 1 / temperature.
        score_weights: of the three scores in the combined one.
        sparse_weight: of the sparse head's losses, 0.1 as published.
        distils: whether to add self-distillation.
        teacher: [B, G], a teacher's scores of each query's own passages, divided by the teacher's
            temperature; ``None``: the positive is the target.

    Returns:
        The rows' losses [B], and the means of their parts by name, detached.
    """
    combined = combined_scores(scores, score_weights)
    every = dict(zip((*HEADS, "combined"), (*scores, combined), strict=True))
    logits = {name: (scale * s).masked_fill(excluded, -torch.inf) for name, s in every.items()}
    targets = None if teacher is None else teacher.to(combined.dtype).softmax(1)
    losses = {name: _cross_entropy(s, own, targets) for name, s in logits.items()}
    weights = {"dense": 1.0, "sparse": sparse_weight, "multi_vector": 1.0}
    total = sum(w * losses[name] for name, w in weights.items()) + losses["combined"]
    total = total / 4
    if distils:
        soft = logits["combined"].detach().softmax(1)
        distilled = {name: _soft_cross_entropy(logits[name], soft) for name in HEADS}
        total = (total + sum(w * distilled[name] for name, w in weights.items()) / 3) / 2
        losses |= {f"{name}_distilled": loss for name, loss in distilled.items()}
    return total, {f"loss_{name}": loss.detach().mean() for name, loss in losses.items()}


def _cross_entropy(logits: Tensor, own: Tensor, targets: Tensor | None) -> Tensor:
    """Return the rows' losses [B], against the positive or, with targets [B, G], listwise."""
    if targets is None:
        return F.cross_entropy(logits, own[:, 0], reduction="none")
    total = torch.zeros_like(targets[:, 0])
    for i in range(own.shape[1]):
        loss = F.cross_entropy(logits, own[:, i], reduction="none")
        total = total + targets[:, i] * loss
        logits = logits.scatter(1, own[:, i : i + 1], -torch.inf)
    return total


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    log_shares = logits.log_softmax(1)
    return -(targets * log_shares.masked_fill(targets == 0, 0.0)).sum(1)
