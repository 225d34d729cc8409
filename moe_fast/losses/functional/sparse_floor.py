"""sparse_floor: keeps a share of every text's tokens alive in the sparse output.

A token's weight is the positive part of its logit z, so a token with z < 0 gets no gradient from
any score, and never returns. With k = ceil(share * n) for a text of n tokens and the margin m:

    penalty of a text = (1 / k) * sum over its k largest logits of max(0, 1 - z / m)

It is 0 while each text has k logits of at least m, and never touches the others: which tokens are
dropped stays the model's choice. docs/three-heads.md describes what happens without it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_floor(logits: Tensor, starts: Tensor, share: float | Tensor, margin: float) -> Tensor:
    """Compute the penalty of each text, [N] float; 0 for a text without tokens.

    Args:
        logits: [T], z.
        starts: [N + 1] int64, where each text's tokens begin.
        share: of a text's tokens, in [0, 1]; a number or a [] tensor.
        margin: m, > 0.
    """
    lengths = starts.diff()
    texts = torch.arange(len(lengths), device=starts.device).repeat_interleave(lengths)
    order = logits.detach().argsort(descending=True, stable=True)
    order = order[texts[order].argsort(stable=True)]  # text after text, the largest first
    texts = texts[order]
    rank = torch.arange(len(order), device=order.device) - starts[texts]
    wanted = torch.ceil(share * lengths.to(logits.dtype))
    kept = rank < wanted[texts]
    order, texts = order[kept], texts[kept]
    missing = torch.relu(1 - logits[order] / margin) / wanted[texts]
    return torch.zeros_like(wanted).index_add(0, texts, missing)
