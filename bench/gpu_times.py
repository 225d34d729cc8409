"""The timing half of ``bench/gpu.py``: our expert MLP beside what else could compute it.

All candidates of a comparison run in turn, each as a replayed CUDA graph where it can be captured:
what is compared is the GPU's time. ``cublas`` is the line that must hold: a loop of one dense MLP
per expert over rows that were sorted beforehand, offsets on the host, eager GELU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast import ops

from .gpu_cases import BOUNDS, Case, Problem
from .harness import Result, compare

OURS, CUBLAS, DENSE, GROUPED = "moe_fast", "cublas", "dense", "grouped_mm"
Run = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches: FLOP/s of an 8192^3 product, bytes/s of a copy, read plus written."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Settings:
    """How to time: on which device, for how many rounds, and as what it dry-runs."""

    device: torch.device
    rounds: int
    dry: bool = False

    def seconds(self, run: Callable[[], Any]) -> float:
        """The median time of one candidate alone."""
        return self.compare({"": run}, "", lambda _: None)[0].seconds.median

    def compare(
        self, candidates: Mapping[str, Callable[[], Any]], baseline: str, check: Callable
    ) -> list[Result]:
        """``bench.harness.compare`` on this device."""
        return compare(
            candidates,
            baseline=baseline,
            check=check,
            rounds=self.rounds,
            warmup=0 if self.dry else 2,
            min_sample_seconds=0 if self.dry else 0.02,
            synchronize=(lambda: None) if self.dry else torch.cuda.synchronize,
        )


def ceilings(settings: Settings, dtype: torch.dtype) -> Ceilings:
    """Measured here, on random data."""
    n = 64 if settings.dry else 8192
    a, b = (torch.randn(n, n, device=settings.device).to(dtype) for _ in range(2))
    source = torch.randn(n * n, device=settings.device)
    target = torch.empty_like(source)
    return Ceilings(
        flops=2 * n**3 / settings.seconds(lambda: a @ b),
        bandwidth=2 * source.nbytes / settings.seconds(lambda: target.copy_(source)),
    )


def floor(case: Case, ceilings: Ceilings, backward: bool) -> float:
    """Seconds: over the products, the larger of computing and of moving the least bytes."""
    size, rows = case.dtype.itemsize, case.tokens * case.k
    a, b, z = size * rows * case.dim, size * rows * case.hidden, size * rows * case.width
    up, down = (
        case.experts * case.width * case.dim * size,
        case.experts * case.dim * case.hidden * size,
    )
    wide, narrow = 2 * rows * case.dim * case.width, 2 * rows * case.dim * case.hidden
    products = [(wide, a + up + z + b), (narrow, b + down + a)]
    if backward:
        products += [
            (narrow, a + down + 2 * z + b),  # dh; reads z, writes dz and h
            (narrow, a + b + down),  # dW2
            (wide, z + up + a),  # dx
            (wide, a + z + up),  # dW1
        ]
    return sum(max(f / ceilings.flops, m / ceilings.bandwidth) for f, m in products)


# --- candidates ----------------------------------------------------------------------------------


def call(
    run: Run, tensors: Mapping[str, Tensor | None], upstream: Tensor, backward: bool
) -> Callable[[], list[Tensor]]:
    """Forward without gradients, or forward and backward to every tensor; returns y first."""
    leaves = {
        n: None if t is None else t.detach().clone().requires_grad_(backward)
        for n, t in tensors.items()
    }
    wanted = [t for t in leaves.values() if t is not None]

    def once() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            y = run(leaves)
        return [y.detach(), *torch.autograd.grad(y, wanted, upstream)] if backward else [y]

    return once


def captured(run: Callable[[], list[Tensor]], settings: Settings) -> Callable[[], list[Tensor]]:
    """``run`` as the replay of a CUDA graph; on the CPU itself."""
    if settings.dry:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


def cublas(problem: Problem) -> tuple[Run, dict[str, Tensor | None], Tensor]:
    """Per-expert products over rows in the plan's order; y and upstream by row."""
    plan, tokens = problem.plan, problem.plan.row_to_token
    counts = plan.expert_offsets.diff().tolist()
    tensors = {**problem.tensors}
    x, weights = tensors["x"], tensors.pop("top_k_weights")
    assert x is not None and weights is not None
    tensors["x"] = x[tokens]
    tensors["row_weights"] = weights.view(-1)[plan.row_to_slot][:, None].to(x.dtype)

    def run(t: Mapping[str, Any]) -> Tensor:
        parts = []
        for e, rows in enumerate(t["x"].split(counts)):
            h = F.gelu(F.linear(rows, t["up_proj"][e], t["up_proj_bias"][e]))
            parts.append(F.linear(h, t["down_proj"][e], t["down_proj_bias"][e]))
        return torch.cat(parts) * t["row_weights"]

    return run, tensors, problem.upstream[tokens]


def dense(problem: Problem, settings: Settings) -> tuple[Run, dict[str, Tensor | None], Tensor]:
    """The dense MLP over as many rows under torch.compile."""
    case, device = problem.case, settings.device
    rows = case.tokens * case.k
    tensors = {n: None if t is None else t[0].clone() for n, t in problem.tensors.items()}
    del tensors["top_k_weights"]
    tensors["x"] = torch.randn(rows, case.dim, device=device).to(case.dtype)

    @torch.compile(backend="eager" if settings.dry else "inductor")
    def mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)

    def run(t: Mapping[str, Any]) -> Tensor:
        return mlp(t["x"], t["up_proj"], t["up_proj_bias"], t["down_proj"], t["down_proj_bias"])

    return run, tensors, torch.randn(rows, case.dim, device=device).to(case.dtype)


def transformers_experts(problem: Problem) -> Run:
    """transformers' ungated experts under its ``grouped_mm``; they have no biases."""
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    case = problem.case
    config = NemotronHConfig(
        n_routed_experts=case.experts,
        hidden_size=case.dim,
        moe_intermediate_size=case.hidden,
        mlp_hidden_act="gelu",
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = NemotronHExperts(config)

    def run(t: Mapping[str, Any]) -> Tensor:
        parameters = {"up_proj": t["up_proj"], "down_proj": t["down_proj"]}
        arguments = (t["x"], problem.top_k_index, t["top_k_weights"])
        return torch.func.functional_call(experts, parameters, arguments)

    return run


# --- comparisons ---------------------------------------------------------------------------------


def ours(problem: Problem) -> Run:
    """expert_mlp, its plan made beforehand."""
    return problem.forward


def with_router(problem: Problem, settings: Settings) -> tuple[Run, dict[str, Tensor | None]]:
    """Router and plan too, as in a layer that learns its routing."""
    case = problem.case
    router = torch.randn(case.experts, case.dim, device=settings.device).to(case.dtype)
    tensors = {**problem.tensors, "router": router * case.dim**-0.5}
    del tensors["top_k_weights"]

    def run(t: Mapping[str, Any]) -> Tensor:
        routing = ops.route(t["x"], t["router"], case.k, backend="triton")
        plan = ops.plan(routing.top_k_index, case.experts, backend="triton")
        return problem.forward({**t, "top_k_weights": routing.top_k_weights}, plan)

    return run, tensors


def against_others(case: Case, backward: bool, settings: Settings) -> list[Result]:
    """Ours, ours with router and plan, and dense, over the per-expert cuBLAS loop."""
    torch.manual_seed(0)
    problem = Problem(case, settings.device)
    loop, loop_tensors, loop_upstream = cublas(problem)
    plain, plain_tensors, plain_upstream = dense(problem, settings)
    routed, routed_tensors = with_router(problem, settings)
    calls = {
        CUBLAS: call(loop, loop_tensors, loop_upstream, backward),
        OURS: call(ours(problem), problem.tensors, problem.upstream, backward),
        "moe_fast, router, plan": call(routed, routed_tensors, problem.upstream, backward),
        DENSE: call(plain, plain_tensors, plain_upstream, backward),
    }
    plan, weights = problem.plan, problem.tensors["top_k_weights"]
    assert weights is not None

    def check(outputs: dict[str, Any]) -> None:
        rows = outputs[CUBLAS][0][plan.slot_to_row].view(case.tokens, case.k, case.dim)
        _near(outputs[OURS][0], rows.float().sum(1), case.dtype)

    runs = {name: captured(run, settings) for name, run in calls.items()}
    return settings.compare(runs, CUBLAS, check)


def against_transformers(case: Case, backward: bool, settings: Settings) -> list[Result]:
    """Ours without biases, and transformers' ``grouped_mm`` experts over it."""
    torch.manual_seed(0)
    problem = Problem(dataclasses.replace(case, bias=False), settings.device)
    runs = {
        name: captured(call(run, problem.tensors, problem.upstream, backward), settings)
        for name, run in ((OURS, ours(problem)), (GROUPED, transformers_experts(problem)))
    }

    def check(outputs: dict[str, Any]) -> None:
        _near(outputs[OURS][0], outputs[GROUPED][0], case.dtype)

    return settings.compare(runs, OURS, check)


def alone(case: Case, backward: bool, settings: Settings) -> float:
    """Seconds of ours."""
    torch.manual_seed(0)
    problem = Problem(case, settings.device)
    run = call(ours(problem), problem.tensors, problem.upstream, backward)
    return settings.seconds(captured(run, settings))


def layers_enforced(case: Case, settings: Settings, layers: int = 12) -> list[Result]:
    """``layers`` MLPs in turn, routed by sentence with one plan for all, over as many dense."""
    torch.manual_seed(0)
    problem = Problem(case, settings.device)
    sentences = torch.arange(case.experts, device=settings.device)
    counts = torch.full_like(sentences, case.tokens // case.experts)
    counts[0] += case.tokens - counts.sum()
    ids = sentences.repeat_interleave(counts)[:, None]  # sentences sorted by expert
    problem.tensors["top_k_weights"] = torch.ones(case.tokens, 1, device=settings.device)
    plain, plain_tensors, plain_upstream = dense(problem, settings)

    def moe(t: Mapping[str, Any]) -> Tensor:
        plan = ops.plan(ids, case.experts, backend="triton")
        x = t["x"]
        for _ in range(layers):
            x = problem.forward({**t, "x": x}, plan)
        return x

    def stack(t: Mapping[str, Any]) -> Tensor:
        x = t["x"]
        for _ in range(layers):
            x = plain({**t, "x": x})
        return x

    calls = {
        DENSE: call(stack, plain_tensors, plain_upstream, True),
        OURS: call(moe, problem.tensors, problem.upstream, True),
    }
    runs = {name: captured(run, settings) for name, run in calls.items()}
    return settings.compare(runs, DENSE, lambda outputs: None)


def _near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise unless two 16-bit computations of the same agree: each is within its bound."""
    error = ((actual.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error <= 2 * BOUNDS[dtype]:
        raise AssertionError(f"candidates differ by {error:.1e}.")
