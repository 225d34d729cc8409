"""How often an anchor's own positive is its best candidate."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def in_batch_accuracy(
    logits: Tensor, positive: Tensor, candidate: Tensor, first: int = 0
) -> Tensor:
    """Return the share of rows, [] float, whose own positive has the largest logit.

    It is compared with candidates that are not positives; masked ones do not count. A tie is an
    error.

    Args:
        logits: [R, N], R rows against N candidates; row i's own positive is in column
            ``first + i``.
        positive, candidate: [R, N] bool, as
            :func:`moe_fast.ops.info_nce.reference.positives_and_candidates` returns them.
    """
    # "not smaller" instead of "larger or equal": a NaN then counts as an error, like a tie
    own = logits[:, first : first + len(logits)].diagonal()
    beats = candidate & ~positive & ~(logits < own[:, None])
    return (~beats.any(1)).to(logits.dtype).mean()
