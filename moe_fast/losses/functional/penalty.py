"""contrastive_learning_penalty: keep a negative near the queries that it does answer.

    penalty = mean over pairs (h', h*) of 1 - cos(h', h*)

with h' the embedding of a negative and h* that of a query which h' answers. A contrastive loss
pushes h' away from the query it is a negative of, and with it from its own queries; this pulls it
back. There is no temperature in it, and gradients go into both.

Source: Yu, arXiv 2412.17364. The paper prints the penalty with the opposite sign of its code's; the
code's, which this is, makes sense. That code pairs the two by broadcasting and is right for one
query per batch only; here they are paired row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops.checks import FLOAT_DTYPES, check_dtype, check_like, check_shape, compute_dtype


def contrastive_learning_penalty(negatives: Tensor, queries: Tensor) -> Tensor:
    """The mean of 1 - cos over P pairs.

    Args:
        negatives: [P, d], P >= 1; a negative that answers several queries stands there once for
            each of them.
        queries: [P, d], row p being a query that ``negatives[p]`` answers.

    Returns:
        [] float32 (float64 for float64 inputs), in [0, 2].

    Raises:
        ValueError, TypeError: for shapes, dtypes or devices that do not fit.
    """
    check_dtype("negatives", negatives, FLOAT_DTYPES)
    check_shape("negatives", negatives, (None, None), "[P, d]")
    if len(negatives) == 0:
        raise ValueError("negatives must hold at least one row: the mean over none is undefined.")
    check_shape("queries", queries, tuple(negatives.shape), "[P, d]")
    check_like("negatives", negatives, queries=queries)
    dtype = compute_dtype(negatives.dtype)
    with torch.autocast(negatives.device.type, enabled=False):
        unit, query = (F.normalize(x.to(dtype), dim=-1) for x in (negatives, queries))
        return (1 - (unit * query).sum(-1)).mean()
