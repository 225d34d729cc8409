"""ops.expert_mlp against one dense MLP over as many rows, and against transformers' experts.

- ``dense``: the MLP that was upcycled, over S = T*K rows, with its biases: the same products, no
  routing. Few rows cannot reach it, since E experts' weights must be read where dense reads one:
  their floor is dense's time plus the other hit experts' bytes over the read bandwidth, which is
  measured in the same run.
- ``eager``, ``batched_mm``, ``grouped_mm``: transformers' ungated experts (NemotronHExperts) under
  each of its implementations; no biases, for any of the candidates. ``batched_mm`` copies the
  weights for every row and is left out where that takes more than a gigabyte.

The plan is made beforehand, as one plan serves all layers where routing is enforced. Outputs, and
in the backward all gradients, are compared with the reference in float64 before any timing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moe_fast import available_backends, ops
from moe_fast.ops import native

from .cases import OURS, Candidates, Case, near
from .harness import Result, compare, table
from .peers import compiled_dense, dense, gpu_only, masked_loop, sorted_products
from .record import Recorder, Row, Work

EXPERTS = 8
LARGEST_COPY = 1 << 30
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAMES = ("x", "up_proj", "down_proj", "up_proj_bias", "down_proj_bias", "top_k_weights")

Run = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Shape:
    """One case: T tokens, width D (H = 4D), K experts per token of E."""

    tokens: int
    dim: int
    k: int
    dtype: torch.dtype
    experts: int = EXPERTS

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T={self.tokens} D={self.dim} K={self.k} {dtype}"


class Problem:
    """Tensors of one case; the last gradient goes to the routing weights."""

    def __init__(self, shape: Shape, bias: bool) -> None:
        torch.manual_seed(0)
        tokens, dim, hidden, dtype = shape.tokens, shape.dim, 4 * shape.dim, shape.dtype
        experts = shape.experts
        self.shape = shape
        self.tensors: dict[str, Any] = dict(
            x=torch.randn(tokens, dim).to(dtype),
            up_proj=(torch.randn(experts, hidden, dim) / dim**0.5).to(dtype),
            down_proj=(torch.randn(experts, dim, hidden) / hidden**0.5).to(dtype),
            up_proj_bias=torch.randn(experts, hidden).to(dtype) if bias else None,
            down_proj_bias=torch.randn(experts, dim).to(dtype) if bias else None,
            top_k_weights=torch.rand(tokens, shape.k) + 0.1,
        )
        # A random route without a router: K different experts per token, as top-K would give.
        self.top_k_index = torch.rand(tokens, experts).topk(shape.k).indices
        self.plan = ops.plan(self.top_k_index, experts)
        self.upstream = torch.randn(tokens, dim).to(dtype)

    def ours(self, tensors: Mapping[str, Any], backend: str | None = None) -> Tensor:
        """expert_mlp of ``tensors``."""
        x, up, down, up_bias, down_bias, weights = (tensors[n] for n in NAMES)
        return ops.expert_mlp(x, up, down, up_bias, down_bias, weights, self.plan, backend=backend)

    def exact(self, backward: bool) -> list[Tensor]:
        """The reference in float64: y, or y and all gradients."""
        doubles = {n: None if t is None else t.double() for n, t in self.tensors.items()}
        call = timed(lambda t: self.ours(t, "torch"), doubles, self.upstream.double(), backward)
        return call()

    def dense(self) -> tuple[Run, dict, Tensor]:
        """The dense MLP over S rows: function, its tensors, and the upstream gradient."""
        rows = self.shape.tokens * self.shape.k
        tensors = {n: None if t is None else t[0].clone() for n, t in self.tensors.items()}
        tensors["x"] = torch.randn(rows, self.shape.dim).to(self.shape.dtype)
        del tensors["top_k_weights"]
        return dense, tensors, torch.randn(rows, self.shape.dim).to(self.shape.dtype)


def timed(
    run: Run,
    tensors: Mapping[str, Tensor | None],
    upstream: Tensor,
    backward: bool,
) -> Callable[[], list[Tensor]]:
    """A call that runs forward without gradients, or forward and backward to every tensor."""
    leaves = {
        n: None if t is None else t.detach().clone().requires_grad_(backward)
        for n, t in tensors.items()
    }
    wanted = [t for t in leaves.values() if t is not None]

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            y = run(leaves)
        return [y.detach(), *torch.autograd.grad(y, wanted, upstream)] if backward else [y]

    return call


def read_bandwidth() -> float:
    """Bytes per second of reading 256 MiB on all threads, the median of nine."""
    buffer = torch.ones(64 << 20)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        buffer.sum()
        seconds.append(time.perf_counter() - start)
    return buffer.nbytes / statistics.median(seconds)


def against_dense(shape: Shape, backward: bool, rounds: int, seconds: float) -> list[Result]:
    """moe_fast over dense, the baseline."""
    problem = Problem(shape, bias=True)
    plain, dense_tensors, dense_upstream = problem.dense()
    candidates = {
        "dense": timed(plain, dense_tensors, dense_upstream, backward),
        OURS: timed(problem.ours, problem.tensors, problem.upstream, backward),
    }
    check = near(problem.exact(backward), TOLERANCES[shape.dtype], ("dense",))
    return compare(
        candidates, baseline="dense", check=check, rounds=rounds, warmup=1, max_seconds=seconds
    )


def run_peer(experts: torch.nn.Module, top_k_index: Tensor, tensors: Mapping[str, Any]) -> Tensor:
    """transformers' experts module, called as its own models do, on the weights of ``tensors``."""
    for name in ("up_proj", "down_proj"):
        experts._parameters[name] = tensors[name]  # functional_call would cost its own time
    return experts(tensors["x"], top_k_index, tensors["top_k_weights"])


def copied_bytes(shape: Shape) -> int:
    """What ``batched_mm`` copies: one projection's weights for every row."""
    return shape.tokens * shape.k * 4 * shape.dim**2 * shape.dtype.itemsize


def peers(problem: Problem) -> dict[str, Run]:
    """transformers' experts on the problem's weights, by implementation."""
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    shape = problem.shape
    found: dict[str, Run] = {}
    for name in ("eager", "batched_mm", "grouped_mm"):
        if name == "batched_mm" and copied_bytes(shape) > LARGEST_COPY:
            continue
        config = NemotronHConfig(
            n_routed_experts=shape.experts,
            hidden_size=shape.dim,
            moe_intermediate_size=4 * shape.dim,
            mlp_hidden_act="gelu",
        )
        config._experts_implementation = name
        with torch.device("meta"):
            experts = NemotronHExperts(config)
        found[name] = partial(run_peer, experts, problem.top_k_index)
    return found


def against_peers(shape: Shape, rounds: int, seconds: float) -> list[Result]:
    """Forward of moe_fast over transformers' implementations."""
    problem = Problem(shape, bias=False)
    candidates = {OURS: timed(problem.ours, problem.tensors, problem.upstream, False)}
    candidates |= {
        name: timed(run, problem.tensors, problem.upstream, False)
        for name, run in peers(problem).items()
    }
    # transformers rounds each expert's result to the dtype before the sum: twice our tolerance.
    check = near(problem.exact(False), 2 * TOLERANCES[shape.dtype])
    return compare(
        candidates, baseline=OURS, check=check, rounds=rounds, warmup=1, max_seconds=seconds
    )


def floor_seconds(shape: Shape, backward: bool, dense: Result, bandwidth: float) -> float:
    """Dense's time and that of the other hit experts' bytes at the read bandwidth.

    Their weights, in the backward once more, and their gradients.
    """
    hit = min(EXPERTS, shape.tokens * shape.k)
    moved = (hit - 1) * 8 * shape.dim**2 * shape.dtype.itemsize * (3 if backward else 1)
    return dense.seconds.median + moved / bandwidth


def verdict(shape: Shape, backward: bool, results: list[Result], floor: float) -> str:
    """Beside its target the ratio to dense, or of few rows that to the floor."""
    dense, ours = results[0], next(r for r in results if r.name == OURS)
    if shape.tokens >= 2048:
        large = shape.tokens >= 8192
        target = (1.08 if large else 1.15) if backward else (1.05 if large else 1.10)
        ratio = ours.ratio.median
        what = f"of dense's time (floor {floor / dense.seconds.median:.2f})"
    else:
        ratio, target, what = ours.seconds.median / floor, 1.15, "of the floor"
    return f"{ratio:.2f} {what}, target {target}: {'met' if ratio <= target else 'MISSED'}"


def rows_of(
    operation: str, shape: Shape, results: list[Result], floor: float | None = None
) -> list[Row]:
    """The results as rows of a record."""
    letters = {"T": shape.tokens, "D": shape.dim, "K": shape.k}
    dtype = str(shape.dtype).removeprefix("torch.")
    return [
        Row(
            f"expert_mlp, {operation}",
            letters,
            dtype,
            result.name,
            results[0].name,
            result.ratio,
            result.seconds,
            floor_seconds=floor,
            share_of_floor=floor and floor / result.seconds.median,
        )
        for result in results
    ]


def cases(size: str) -> Iterator[Case]:
    """ops.expert_mlp against all of :mod:`bench.peers`, no biases, the plan made beforehand."""
    dims, ks, dtypes = [384], [1, 2], list(TOLERANCES)
    tokens, backward_tokens = [32, 512, 2048], [1024]
    if size == "tiny":
        dims, ks, dtypes, tokens, backward_tokens = [32], [2], [torch.float32], [24], [24]
    elif size == "quick":
        dtypes, tokens = [torch.float32], [32, 2048]
    elif size == "full":
        dims, tokens, backward_tokens = [384, 768], [32, 256, 2048, 8192], [2048, 8192]
    for dim, k, dtype in product(dims, ks, dtypes):
        yield from (case_of(Shape(t, dim, k, dtype), False) for t in tokens)
        yield from (case_of(Shape(t, dim, k, dtype), True) for t in backward_tokens)


def case_of(shape: Shape, backward: bool, sweep: str | None = None) -> Case:
    """One shape in one direction; a sweep leaves the slow and the compiled candidates out."""
    letters = {"T": shape.tokens, "D": shape.dim, "H": 4 * shape.dim, "E": shape.experts}
    return Case(
        f"expert MLP, {'forward + backward' if backward else 'forward'}",
        letters | {"K": shape.k},
        str(shape.dtype).removeprefix("torch."),
        lambda: candidates(shape, backward, everyone=sweep is None),
        work(shape, backward),
        sweep,
    )


def work(shape: Shape, backward: bool) -> Work:
    """FLOP of the two products (six with their gradients); bytes of x, y and the experts hit."""
    rows = shape.tokens * shape.k
    flop = 2 * rows * 2 * shape.dim * 4 * shape.dim
    io = 2 * shape.tokens * shape.dim
    weights = min(shape.experts, rows) * 2 * 4 * shape.dim**2
    if backward:  # read x, y's gradient; write x's. Read the weights again; write theirs.
        return Work(3 * flop, shape.dtype.itemsize * (2.5 * io + 3 * weights))
    return Work(flop, shape.dtype.itemsize * (io + weights))


def candidates(shape: Shape, backward: bool, everyone: bool = True) -> Candidates:
    """Ours and every peer on one problem, checked against the reference in float64."""
    problem = Problem(shape, bias=False)
    absent = gpu_only() if everyone else {}
    same: dict[str, Run] = {OURS: problem.ours, **peers(problem)}
    if "batched_mm" not in same:
        copied = copied_bytes(shape) / 1e9
        absent["batched_mm"] = f"copies each row's weights, {copied:.1f} GB per projection"
    same["per-expert products"] = sorted_products(problem.plan)
    if everyone:
        same["masked loop"] = masked_loop(problem.top_k_index, shape.experts)
    else:
        same.pop("batched_mm", None)
        absent.clear()
    runs = {n: timed(r, problem.tensors, problem.upstream, backward) for n, r in same.items()}
    plain, tensors, upstream = problem.dense()
    runs["dense"] = timed(plain, tensors, upstream, backward)
    if everyone:
        runs["dense, compiled"] = timed(compiled_dense(), tensors, upstream, backward)
    # Peers round each expert's result to the dtype before the sum: twice our own tolerance.
    check = near(problem.exact(backward), 2 * TOLERANCES[shape.dtype], ("dense", "dense, compiled"))
    one = replace(shape, tokens=shape.tokens * shape.k, k=1, experts=1)
    works = dict.fromkeys(("dense", "dense, compiled"), work(one, backward))
    return Candidates(runs, check, absent, works)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case, print tables and verdicts, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no round begins later, once five are done"
    )
    parser.add_argument("--max-tokens", type=int, default=8192, help="leave larger cases out")
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--json", help="write the record to this file")
    arguments = parser.parse_args(argv)

    bandwidth = read_bandwidth()
    recorder = Recorder(
        None,
        backends=available_backends("expert_mlp"),
        products=native.cpu_capability,
        read_bandwidth=bandwidth,
    )
    print(f"reading: {bandwidth / 1e9:.1f} GB/s; cpp: {native.cpu_capability or 'absent'}\n")
    shapes = [
        Shape(tokens, dim, k, dtype)
        for tokens in (32, 256, 2048, 8192)
        for dim in arguments.dims
        for k in (1, 2)
        for dtype in TOLERANCES
        if tokens <= arguments.max_tokens
    ]
    limits = arguments.rounds, arguments.seconds
    for shape in shapes:
        for backward in (False, True) if shape.tokens >= 2048 else (False,):
            direction = "forward + backward" if backward else "forward"
            results = against_dense(shape, backward, *limits)
            floor = floor_seconds(shape, backward, results[0], bandwidth)
            text = verdict(shape, backward, results, floor)
            print(table(results, f"{direction}, {shape}"), text, sep="\n", end="\n\n")
            recorder.add(rows_of(f"beside dense, {direction}", shape, results, floor))
    best = []
    for shape in shapes:
        results = against_peers(shape, *limits)
        print(table(results, f"forward, {shape}, without biases"), end="\n\n")
        recorder.add(rows_of("beside transformers, forward", shape, results))
        best.append(min(r.ratio.median for r in results if r.name != OURS))
    mean = math.exp(sum(map(math.log, best)) / len(best))
    print(f"the best of transformers takes {mean:.2f} times as long (geometric mean, target 1.3); "
          f"at least {min(best):.2f}, at most {max(best):.2f}")  # fmt: skip
    if arguments.json:
        recorder.write(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
