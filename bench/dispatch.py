"""The sparse part alone: plan, gather_rows and combine_rows against plain PyTorch.

- ``plan``: 131,072 slots; PyTorch's form is a stable ``argsort``, ``bincount`` and index
  arithmetic, written out here. Target: at least 5 times as long.
- ``gather_rows``: ``x[row_to_token]``. ``combine_rows``: index, multiply, sum. Both move the same
  bytes as ours; what they can be faster by is a pass over [S, D].

Outputs are compared before any timing: the plan exactly, sums to their rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fast import available_backends, ops

from .harness import Result, compare, environment, table, write_json

SLOTS = 131_072
TARGET = 5.0
OURS = "moe_fast"
FIELDS = ("expert_offsets", "row_to_token", "row_to_slot", "slot_to_row")


def plain_plan(top_k_index: Tensor, num_experts: int) -> ops.RoutingPlan:
    """The plan of ids that are all below E, as one would write it."""
    flat = top_k_index.flatten()
    row_to_slot = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    slot_to_row = torch.empty_like(row_to_slot)
    slot_to_row[row_to_slot] = torch.arange(flat.numel())
    return ops.RoutingPlan(offsets, row_to_slot // top_k_index.shape[1], row_to_slot, slot_to_row)


def random_ids(slots: int, k: int, num_experts: int) -> Tensor:
    """[slots / k, k]: k different experts per token, as top-K gives."""
    return torch.rand(slots // k, num_experts).topk(k).indices


def check_plans(plans: dict[str, ops.RoutingPlan]) -> None:
    """Raise AssertionError unless all plans are the same."""
    for field in FIELDS:
        for name, plan in plans.items():
            if not torch.equal(getattr(plan, field), getattr(plans[OURS], field)):
                raise AssertionError(f"{name} differs from {OURS} in {field}.")


def check_sums(outputs: dict[str, Tensor]) -> None:
    """Raise AssertionError unless all outputs are close."""
    for name, output in outputs.items():
        error = ((output - outputs[OURS]).norm() / outputs[OURS].norm()).item()
        if not error <= (1e-6 if output.dtype == torch.float32 else 1e-2):
            raise AssertionError(f"{name} differs from {OURS} by {error:.1e}.")


def time_plan(slots: int, k: int, num_experts: int, rounds: int) -> list[Result]:
    """PyTorch over moe_fast."""
    ids = random_ids(slots, k, num_experts)
    candidates: dict[str, Callable[[], Any]] = {
        OURS: lambda: ops.plan(ids, num_experts),
        "argsort + bincount": lambda: plain_plan(ids, num_experts),
        "reference": lambda: ops.plan(ids, num_experts, backend="torch"),
    }
    return compare(candidates, baseline=OURS, check=check_plans, rounds=rounds)


def time_rows(slots: int, dim: int, dtype: torch.dtype, rounds: int) -> dict[str, list[Result]]:
    """PyTorch over moe_fast, for both ops, K = 2."""
    plan = ops.plan(random_ids(slots, 2, 8), 8)
    x, w = torch.randn(slots // 2, dim).to(dtype), torch.rand(slots // 2, 2)
    rows = ops.gather_rows(x, plan)
    return {
        "gather_rows": compare(
            {OURS: lambda: ops.gather_rows(x, plan), "index": lambda: x[plan.row_to_token]},
            baseline=OURS,
            check=check_sums,
            rounds=rounds,
        ),
        "combine_rows": compare(
            {
                OURS: lambda: ops.combine_rows(rows, w, plan),
                "index, multiply, sum": lambda: (
                    (rows[plan.slot_to_row.view(w.shape)] * w[..., None]).sum(1).to(dtype)
                ),
            },
            baseline=OURS,
            check=check_sums,
            rounds=rounds,
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables and the verdict, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="write the record to this file")
    arguments = parser.parse_args(argv)
    results: dict[str, list[Result]] = {}
    for k, num_experts in ((1, 8), (2, 8), (2, 64)):
        name = f"plan, S={arguments.slots} K={k} E={num_experts}"
        results[name] = time_plan(arguments.slots, k, num_experts, arguments.rounds)
        print(table(results[name], name))
        ratio = next(r.ratio.median for r in results[name] if r.name == "argsort + bincount")
        print(f"{ratio:.1f} times, target {TARGET}: {'met' if ratio >= TARGET else 'MISSED'}\n")
    for dtype in (torch.float32, torch.bfloat16):
        timed = time_rows(arguments.slots // 8, 384, dtype, arguments.rounds)
        for op, rows in timed.items():
            name = f"{op}, S={arguments.slots // 8} D=384 K=2 {str(dtype).removeprefix('torch.')}"
            results[name] = rows
            print(table(rows, name), end="\n\n")
    if arguments.json:
        record = environment(backends=available_backends("plan"))
        write_json(arguments.json, {"environment": record, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
