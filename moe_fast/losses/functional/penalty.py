"""contrastive_learning_penalty: keep a negative near the queries that it does answer.

    penalty = mean over pairs (h', h*) of 1 - cos(h', h*)

Here h' is the embedding of a negative, and h* that of a query which the negative answers. A
contrastive loss pushes h' away from the query whose negative it is, and thereby also from the
queries that it answers; the penalty pulls it back. It has no temperature; both h' and h* get
gradients.

Source: Yu, arXiv 2412.17364. The paper and its code give the penalty opposite signs. The code's
sign is used here, because it pulls h' and h* together. That code pairs h' and h* by broadcasting,
which is right for one query per batch only; here they are paired row by row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops.checks import FLOAT_DTYPES, check_dtype, check_like, check_shape, compute_dtype


def contrastive_learning_penalty(negatives: Tensor, queries: Tensor) -> Tensor:
    """Compute the mean of 1 - cos over P pairs of a negative and a query that it answers.

    Args:
        negatives: [P, d], P >= 1; a negative that answers several queries is repeated, once for
            each of them.
        queries: [P, d]; ``negatives[p]`` answers ``queries[p]``.

    Returns:
        [] float32 (float64 for float64 inputs), in [0, 2].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
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
