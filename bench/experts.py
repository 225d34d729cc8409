"""ops.expert_mlp's forward against transformers' three, over a grid of shapes and loads.

Half of the grid is balanced, half sends half of the tokens to one expert. Ratios are to moe_fast;
:func:`summary` condenses a record of it. ``dense`` is the MLP that was upcycled, on as many rows.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from .cases import OURS, Candidates, Case, near
from .expert_mlp import DENSE, TOLERANCES, TRANSFORMERS, work
from .harness import Summary
from .peers import dense, transformers_experts
from .problem import HALF, Problem, Run, Shape, bert, timed
from .record import Row, read_record

LOADS = {"any": "balanced", HALF: "half to one expert"}
LARGEST_COPY = 1 << 28  # bytes: above it, batched_mm is never the fastest


def cases(size: str) -> Iterator[Case]:
    """Yield the grid: widths, K, dtypes, loads and numbers of tokens."""
    dims, ks, dtypes = [384, 768], [1, 2], list(TOLERANCES)
    tokens = [16, 256, 2048]
    if size == "tiny":
        dims, ks, dtypes, tokens = [32], [2], [torch.float32], [24]
    elif size == "full":
        dims, tokens = [384, 768, 1024], [16, 64, 256, 1024, 8192]
    for dim, dtype, k, load, count in product(dims, dtypes, ks, LOADS, tokens):
        shape = bert(count, dim, k, dtype, bias=False, load=load)
        prepare, least = partial(candidates, shape), work(shape, backward=False)
        operation = f"experts, {LOADS[load]}"
        yield Case(operation, shape.letters, shape.dtype_name, prepare, least)


def candidates(shape: Shape) -> Candidates:
    """Make ours, transformers' experts and dense, checked against the reference in float32."""
    problem = Problem(shape)
    runs: dict[str, Run] = {OURS: problem.forward}
    absent = {}
    copied = shape.tokens * shape.k * shape.dim * shape.hidden * shape.dtype.itemsize
    for name in TRANSFORMERS:
        if name == "batched_mm" and copied > LARGEST_COPY:
            absent[name] = f"copies each row's weights, {copied / 1e9:.1f} GB per projection"
        else:
            runs[name] = transformers_experts(problem, name)
    timed_runs = {n: timed(r, problem.tensors, problem.upstream, False) for n, r in runs.items()}
    timed_runs["dense"] = timed(dense, *problem.dense(), False)
    exact = list(problem.outputs("torch", False, torch.float32).values())
    one = replace(shape, tokens=shape.tokens * shape.k, k=1, experts=1)
    check = near(exact, 2 * TOLERANCES[shape.dtype], DENSE)
    return Candidates(timed_runs, check, absent, {"dense": work(one, backward=False)})


def summary(rows: Iterable[Row]) -> str:
    """Say, by dtype, how many times as long the best of transformers' three takes, and the least.

    The least is that of the upper quartile: below 1 means slower outside of the quartiles.
    """
    best: dict[tuple[str, str, str], tuple[Summary, str]] = {}
    for row in rows:
        if row.ratio is None or row.who not in TRANSFORMERS:
            continue
        if row.case not in best or row.ratio.median < best[row.case][0].median:
            best[row.case] = row.ratio, f"{', '.join(row.case[:2])}, {row.who}"
    by_dtype: dict[str, list[tuple[Summary, str]]] = defaultdict(list)
    for (_, _, dtype), found in best.items():
        by_dtype[dtype].append(found)
    lines = []
    for dtype, cases_of in by_dtype.items():
        mean = math.exp(sum(math.log(ratio.median) for ratio, _ in cases_of) / len(cases_of))
        least, where = min(cases_of, key=lambda found: found[0].median)
        slower = sum(ratio.q3 < 1 for ratio, _ in cases_of)
        lines.append(
            f"{dtype}: {len(cases_of)} cases, geometric mean {mean:.2f}, least {least.median:.2f} "
            f"({where}), {slower} below 1 outside the quartiles"
        )
    return "\n".join(lines)


if __name__ == "__main__":  # python -m bench.experts RECORD.json
    print(summary(read_record(Path(sys.argv[1])).rows))
