"""ops.expert_mlp against transformers' experts, other loops, and a dense MLP over as many rows.

``expert MLP`` has no biases, because transformers' ungated experts have none; its candidates are
those of :mod:`bench.peers`. ``batched_mm`` copies the weights for every row, and is left out if
that takes more than a gigabyte. ``expert MLP beside dense`` has biases and is compared with the MLP
that was upcycled. With few rows the mixture cannot be as fast: the weights of E experts must be
read instead of one's.

The plan is made beforehand, because one plan serves all layers if routing is enforced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor

from .cases import OURS, Candidates, Case, near
from .peers import (
    compiled_dense,
    dense,
    gpu_only,
    masked_loop,
    sorted_products,
    transformers_experts,
)
from .problem import Problem, Run, Shape, bert, timed
from .record import Work

LARGEST_COPY = 1 << 30
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DENSE = ("dense", "dense, compiled")
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")


def cases(size: str) -> Iterator[Case]:
    """Yield every shape beside all peers, then beside dense."""
    dims, ks, dtypes = [384], [1, 2], list(TOLERANCES)
    tokens, backward_tokens = [32, 512, 2048], [1024]
    if size == "tiny":
        dims, ks, dtypes, tokens, backward_tokens = [32], [2], [torch.float32], [24], [24]
    elif size == "quick":
        dtypes, tokens = [torch.float32], [32, 2048]
    elif size == "full":
        dims, tokens, backward_tokens = [384, 768], [32, 256, 2048, 8192], [2048, 8192]
    for dim, k, dtype in product(dims, ks, dtypes):
        for backward, counts in ((False, tokens), (True, backward_tokens)):
            yield from (case_of(bert(t, dim, k, dtype, bias=False), backward) for t in counts)
            yield from (beside_dense(bert(t, dim, k, dtype), backward) for t in counts)


def case_of(shape: Shape, backward: bool, sweep: str | None = None) -> Case:
    """Make the case of one shape and direction; a sweep leaves out slow and compiled candidates."""
    return Case(
        f"expert MLP, {'forward + backward' if backward else 'forward'}",
        shape.letters,
        shape.dtype_name,
        partial(candidates, shape, backward, everyone=sweep is None),
        work(shape, backward),
        sweep,
    )


def beside_dense(shape: Shape, backward: bool) -> Case:
    """Make the case of one shape and direction with ratios to dense."""

    def prepare() -> Candidates:
        problem = Problem(shape)
        runs = {
            "dense": timed(dense, *problem.dense(), backward),
            OURS: timed(problem.forward, problem.tensors, problem.upstream, backward),
        }
        return Candidates(runs, near(exact_of(problem, backward), TOLERANCES[shape.dtype], DENSE))

    operation = f"expert MLP beside dense, {'forward + backward' if backward else 'forward'}"
    least = work(shape, backward)
    return Case(operation, shape.letters, shape.dtype_name, prepare, least, baseline="dense")


def exact_of(problem: Problem, backward: bool) -> list[Tensor]:
    """Return the float64 reference: y, or y and all gradients."""
    return list(problem.outputs("torch", backward, torch.float64).values())


def work(shape: Shape, backward: bool) -> Work:
    """Count the FLOP of two products (six with gradients), and bytes of x, y and used experts."""
    rows = shape.tokens * shape.k
    flop = 2 * rows * 2 * shape.dim * shape.hidden
    io = 2 * shape.tokens * shape.dim
    weights = min(shape.experts, rows) * 2 * shape.dim * shape.hidden
    if backward:  # also reads x, grad y and the weights; writes grad x and the weights' gradients
        return Work(3 * flop, shape.dtype.itemsize * (2.5 * io + 3 * weights))
    return Work(flop, shape.dtype.itemsize * (io + weights))


def candidates(shape: Shape, backward: bool, everyone: bool = True) -> Candidates:
    """Make ours and every peer on one problem, checked against the reference in float64."""
    problem = Problem(shape)
    absent = gpu_only() if everyone else {}
    same: dict[str, Run] = {OURS: problem.forward}
    copied = shape.tokens * shape.k * shape.dim * shape.hidden * shape.dtype.itemsize
    for name in TRANSFORMERS:
        if name == "batched_mm" and (copied > LARGEST_COPY or not everyone):
            absent[name] = f"copies each row's weights, {copied / 1e9:.1f} GB per projection"
        else:
            same[name] = transformers_experts(problem, name)
    same["per-expert products"] = sorted_products(problem.plan)
    if everyone:
        same["masked loop"] = masked_loop(problem.top_k_index, shape.experts)
    else:
        absent.clear()
    runs = {n: timed(r, problem.tensors, problem.upstream, backward) for n, r in same.items()}
    plain = problem.dense()
    runs["dense"] = timed(dense, *plain, backward)
    if everyone:
        runs["dense, compiled"] = timed(compiled_dense(), *plain, backward)
    # Peers round each expert's result to the dtype before the sum: twice our own tolerance.
    check = near(exact_of(problem, backward), 2 * TOLERANCES[shape.dtype], DENSE)
    one = replace(shape, tokens=shape.tokens * shape.k, k=1, experts=1)
    return Candidates(runs, check, absent, dict.fromkeys(DENSE, work(one, backward)))
