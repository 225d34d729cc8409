"""How often an anchor's own positive is its best candidate."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def in_batch_accuracy(
    logits: Tensor, positive: Tensor, candidate: Tensor, first: int = 0
) -> Tensor:
    """[] float, the share of rows whose own positive has the largest logit; ties count against it.

    Args:
        logits: [R, N], row i's own positive in column ``first + i``.
        positive, candidate: [R, N] bool, as
            :func:`moe_fast.ops.info_nce.reference.positives_and_candidates` gives them.
    """
    # "not smaller", so that NaN counts against the row as a tie does
    own = logits[:, first : first + len(logits)].diagonal()
    beats = candidate & ~positive & ~(logits < own[:, None])
    return (~beats.any(1)).to(logits.dtype).mean()
