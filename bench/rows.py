"""Sorting rows by expert (gather_rows) and the weighted sum back (combine_rows), against indexing.

``gather_rows`` is compared with ``x[row_to_token]``, ``combine_rows`` with index, multiply and sum.
The alternatives move the same bytes; they can differ by a pass over [S, D], S = T * K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from moe_fast import ops

from .cases import OURS, Candidates, Case, near
from .record import Work

DIM, EXPERTS, K = 384, 8, 2
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def cases(size: str) -> Iterator[Case]:
    """Yield both operations at S = 2T rows."""
    tokens = {"tiny": 24, "quick": 8192, "default": 8192}.get(size, 65536)
    for dtype, operation in product(TOLERANCES, ("gather_rows", "combine_rows")):
        yield Case(
            operation,
            {"T": tokens, "D": DIM, "E": EXPERTS, "K": K},
            str(dtype).removeprefix("torch."),
            partial(candidates, operation, tokens, dtype),
            # One of [S, D] and [T, D] is read, the other one written.
            Work(0, dtype.itemsize * tokens * DIM * (K + 1)),
        )


def candidates(operation: str, tokens: int, dtype: torch.dtype) -> Candidates:
    """Make ours, and the same by indexing."""
    plan = ops.plan(torch.rand(tokens, EXPERTS).topk(K).indices, EXPERTS)
    x, weights = torch.randn(tokens, DIM).to(dtype), torch.rand(tokens, K)
    rows = x[plan.row_to_token]

    def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
        return (rows[plan.slot_to_row.view(tokens, K)] * weights[..., None]).sum(1)

    runs: dict[str, Callable[[], list[Tensor]]] = {
        OURS: lambda: [ops.gather_rows(x, plan)],
        "index": lambda: [x[plan.row_to_token]],
    }
    exact = rows
    if operation == "combine_rows":
        runs = {
            OURS: lambda: [ops.combine_rows(rows, weights, plan)],
            "index, multiply, sum": lambda: [weighted_sum(rows, weights).to(dtype)],
        }
        exact = weighted_sum(rows.double(), weights.double())
    return Candidates(runs, near([exact], TOLERANCES[dtype]))
