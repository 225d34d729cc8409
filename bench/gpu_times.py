"""The timing of ``bench/gpu.py``: our expert MLP beside alternatives.

All candidates of a comparison run in turn, each as a replayed CUDA graph if it can be captured, so
that the GPU's time is compared. ``cublas`` is the baseline that ours must beat: a loop of one dense
MLP per expert over rows that were sorted beforehand, with offsets on the host and eager GELU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_fast import ops

from .cases import OURS, Candidates, Case, measure, near
from .harness import race
from .peers import compiled_dense, expert_mlp, transformers_experts
from .problem import BOUNDS, Problem, Run, Shape, timed
from .record import Row

Outputs = TypeVar("Outputs")
# BERT-base with 64k tokens; and what takes its place in the interpreter.
BASE = Shape(65_536, experts=8, k=1, dim=768, hidden=3072, dtype=torch.bfloat16)
DRY = Shape(24, experts=3, k=1, dim=16, hidden=32, dtype=torch.float32)
SWEEP = (8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
DRY_SWEEP = (24, 48)
CUBLAS, DENSE, GROUPED = "cublas", "dense", "grouped_mm"


@dataclass(frozen=True)
class Ceilings:
    """The limits of this GPU: FLOP/s of an 8192^3 product, bytes/s (read and written) of a copy."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Settings:
    """How to time: the device, the number of rounds, and whether it is a dry run on the CPU."""

    device: torch.device
    rounds: int
    dry: bool = False

    @property
    def timing(self) -> dict[str, Any]:
        """The arguments of :func:`bench.harness.race` and :func:`bench.cases.measure`."""
        return dict(
            rounds=self.rounds,
            warmup=0 if self.dry else 2,
            min_sample_seconds=0 if self.dry else 0.02,
            synchronize=(lambda: None) if self.dry else torch.cuda.synchronize,
        )

    def seconds(self, run: Callable[[], Any]) -> float:
        """Return the median time of one candidate alone."""
        return race({"": run}, baseline="", **self.timing)[0].seconds.median

    def captured(self, run: Callable[[], Outputs]) -> Callable[[], Outputs]:
        """Return ``run`` as the replay of a CUDA graph; ``run`` itself in a dry run."""
        return run if self.dry else captured(run)

    def problem(self, shape: Shape) -> Problem:
        """Make random tensors on the device, for our kernels."""
        return Problem(shape, self.device, "triton")


def ceilings(settings: Settings, dtype: torch.dtype) -> Ceilings:
    """Measure the limits of this GPU, on random data."""
    n = 64 if settings.dry else 8192
    a, b = (torch.randn(n, n, device=settings.device).to(dtype) for _ in range(2))
    source = torch.randn(n * n, device=settings.device)
    target = torch.empty_like(source)
    return Ceilings(
        flops=2 * n**3 / settings.seconds(lambda: a @ b),
        bandwidth=2 * source.nbytes / settings.seconds(lambda: target.copy_(source)),
    )


def products_work(shape: Shape, backward: bool) -> dict[str, tuple[float, float]]:
    """Return FLOP and bytes moved of each product, by the names that the tuner gives them."""
    size, rows = shape.dtype.itemsize, shape.tokens * shape.k
    a, b, z = (size * rows * columns for columns in (shape.dim, shape.hidden, shape.width))
    up, down = (size * shape.experts * shape.dim * n for n in (shape.width, shape.hidden))
    wide, narrow = 2 * rows * shape.dim * shape.width, 2 * rows * shape.dim * shape.hidden
    products: dict[str, tuple[float, float]]
    products = {"up": (wide, a + up + z + b), "down": (narrow, b + down + a)}
    if backward:
        products |= {
            "grad_hidden": (narrow, a + down + 2 * z + b),  # reads z, writes dz and h
            "grad_x": (wide, z + up + a),
            "grad_down": (narrow, a + b + down),
            "grad_up": (wide, a + z + up),
        }
    return products


def floor(shape: Shape, ceilings: Ceilings, backward: bool) -> float:
    """Return the least seconds: the sum over products of the larger of computing and moving."""
    work = products_work(shape, backward).values()
    return sum(max(f / ceilings.flops, m / ceilings.bandwidth) for f, m in work)


# --- candidates ----------------------------------------------------------------------------------


def captured(run: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """Return ``run`` as the replay of a CUDA graph."""
    on_side_stream(run, times=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def on_side_stream(run: Callable[[], Any], times: int) -> None:
    """Run on another stream, after all that the current one was given, and wait for it.

    Without the first wait the side stream would read tensors that are still being written.
    """
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(times):
            run()
    current.wait_stream(stream)
    stream.synchronize()


def cublas(problem: Problem) -> tuple[Run, dict[str, Tensor | None], Tensor]:
    """Return per-expert products over sorted rows, their tensors, and upstream gradients by row."""
    plan, tokens = problem.plan, problem.plan.row_to_token
    counts = plan.expert_offsets.diff().tolist()
    tensors = {**problem.tensors}
    x, weights = tensors["x"], tensors.pop("top_k_weights")
    tensors["x"] = x[tokens]
    tensors["row_weights"] = weights.view(-1)[plan.row_to_slot][:, None].to(x.dtype)

    def run(t: Mapping[str, Any]) -> Tensor:
        parts = [expert_mlp(t, e, rows) for e, rows in enumerate(t["x"].split(counts))]
        return torch.cat(parts) * t["row_weights"]

    return run, tensors, problem.upstream[tokens]


def dense(problem: Problem, settings: Settings) -> tuple[Run, dict[str, Any], Tensor]:
    """Return the compiled dense MLP over as many rows, its tensors, and the upstream gradient."""
    return compiled_dense("eager" if settings.dry else "inductor"), *problem.dense()


def with_router(problem: Problem) -> tuple[Run, dict[str, Any], Tensor]:
    """Return our experts with router and plan, as in a layer that learns its routing."""
    shape = problem.shape
    x = problem.tensors["x"]
    router = torch.randn(shape.experts, shape.dim, device=x.device).to(x.dtype)
    tensors = {**problem.tensors, "router": router * shape.dim**-0.5}
    del tensors["top_k_weights"]

    def run(t: Mapping[str, Any]) -> Tensor:
        routing = ops.route(t["x"], t["router"], shape.k, backend="triton")
        plan = ops.plan(routing.top_k_index, shape.experts, backend="triton")
        return problem.forward({**t, "top_k_weights": routing.top_k_weights}, plan)

    return run, tensors, problem.upstream


# --- comparisons ---------------------------------------------------------------------------------


def compare(
    title: str,
    shape: Shape,
    settings: Settings,
    baseline: str,
    calls: Mapping[str, Callable[[], list[Tensor]]],
    check: Callable[[dict[str, Any]], None],
) -> list[Row]:
    """Measure the candidates as CUDA graphs; return their rows."""
    candidates = Candidates({n: settings.captured(run) for n, run in calls.items()}, check)
    case = Case(title, shape.letters, shape.dtype_name, lambda: candidates, baseline=baseline)
    return measure(case, **settings.timing)


def check_alike(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Raise unless two 16-bit results agree, each within its bound of the exact one."""
    near([theirs], 2 * BOUNDS[dtype])({OURS: [ours]})


def against_cublas(shape: Shape, backward: bool, settings: Settings) -> list[Row]:
    """Measure ours, also with router and plan, relative to the cuBLAS loop."""
    problem = settings.problem(shape)
    calls = {
        CUBLAS: timed(*cublas(problem), backward),
        OURS: timed(problem.forward, problem.tensors, problem.upstream, backward),
        "moe_fast, router, plan": timed(*with_router(problem), backward),
    }

    def check(outputs: dict[str, Any]) -> None:
        rows = outputs[CUBLAS][0][problem.plan.slot_to_row].view(shape.tokens, shape.k, shape.dim)
        check_alike(outputs[OURS][0], rows.float().sum(1), shape.dtype)

    return compare("beside cuBLAS", shape, settings, CUBLAS, calls, check)


def against_dense(shape: Shape, backward: bool, settings: Settings) -> list[Row]:
    """Measure ours relative to a compiled dense MLP over as many rows, which computes less."""
    problem = settings.problem(shape)
    calls = {
        DENSE: timed(*dense(problem, settings), backward),
        OURS: timed(problem.forward, problem.tensors, problem.upstream, backward),
    }
    return compare("beside dense", shape, settings, DENSE, calls, lambda outputs: None)


def against_transformers(shape: Shape, backward: bool, settings: Settings) -> list[Row]:
    """Measure transformers' ``grouped_mm`` experts relative to ours, without biases."""
    problem = settings.problem(replace(shape, bias=False))
    runs = {OURS: problem.forward, GROUPED: transformers_experts(problem, GROUPED)}
    calls = {n: timed(r, problem.tensors, problem.upstream, backward) for n, r in runs.items()}

    def check(outputs: dict[str, Any]) -> None:
        check_alike(outputs[OURS][0], outputs[GROUPED][0], shape.dtype)

    return compare("beside transformers", shape, settings, OURS, calls, check)


def of_floor(
    shape: Shape, backward: bool, settings: Settings, ceilings: Ceilings
) -> dict[str, float]:
    """Return the seconds of ours alone, the floor, and their ratio."""
    problem = settings.problem(shape)
    run = timed(problem.forward, problem.tensors, problem.upstream, backward)
    seconds, least = settings.seconds(settings.captured(run)), floor(shape, ceilings, backward)
    return {"seconds": seconds, "floor": least, "share": least / seconds}


def layers_enforced(shape: Shape, settings: Settings, layers: int = 12) -> list[Row]:
    """Measure ``layers`` MLPs routed by sentence with one plan, relative to as many dense MLPs."""
    problem = settings.problem(shape)
    sentences = torch.arange(shape.experts, device=settings.device)
    counts = torch.full_like(sentences, shape.tokens // shape.experts)
    counts[0] += shape.tokens - counts.sum()
    ids = sentences.repeat_interleave(counts)[:, None]  # sentences sorted by expert
    problem.tensors["top_k_weights"] = torch.ones(shape.tokens, 1, device=settings.device)
    plain, plain_tensors, plain_upstream = dense(problem, settings)

    def stack(layer: Run, t: Mapping[str, Any]) -> Tensor:
        x = t["x"]
        for _ in range(layers):
            x = layer({**t, "x": x})
        return x

    def moe(t: Mapping[str, Any]) -> Tensor:
        plan = ops.plan(ids, shape.experts, backend="triton")
        return stack(partial(problem.forward, plan=plan), t)

    calls = {
        DENSE: timed(partial(stack, plain), plain_tensors, plain_upstream, True),
        OURS: timed(moe, problem.tensors, problem.upstream, True),
    }
    return compare(f"{layers} layers", shape, settings, DENSE, calls, lambda outputs: None)


# --- what is compiled beforehand -----------------------------------------------------------------


def step_shapes(dry: bool = False) -> dict[str, Shape]:
    """The shapes of the part ``step``."""
    base = DRY if dry else BASE
    return {"K=1": base, "K=2": replace(base, k=2)}


def sweep_shapes(dry: bool = False) -> list[Shape]:
    """The shapes of the part ``sweep``: batches of other sizes, and other widths."""
    base = DRY if dry else BASE
    scaled = [replace(base, tokens=n) for n in (DRY_SWEEP if dry else SWEEP)]
    widths = () if dry else ((384, 1536), (1024, 4096))
    return [*scaled, *(replace(base, dim=d, hidden=h) for d, h in widths)]


def items(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The launches of the part ``step``: ours in both directions, also with router and plan."""
    for name, shape in step_shapes().items():
        problem = Problem(shape, device, "triton")
        for backward in (True, False):
            run = timed(problem.forward, problem.tensors, problem.upstream, backward)
            yield f"{name}, {'both directions' if backward else 'forward'}", run
        yield f"{name}, router", timed(*with_router(problem), True)


def sweep_items(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The launches of the part ``sweep``."""
    for shape in sweep_shapes():
        problem = Problem(shape, device, "triton")
        for backward in (True, False):
            run = timed(problem.forward, problem.tensors, problem.upstream, backward)
            yield f"{shape}, {'both directions' if backward else 'forward'}", run


def other_items(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The launches of the part ``others`` that ``step`` does not have: experts without biases."""
    problem = Problem(replace(BASE, bias=False), device, "triton")
    for backward in (True, False):
        run = timed(problem.forward, problem.tensors, problem.upstream, backward)
        yield f"no biases, {'both directions' if backward else 'forward'}", run
