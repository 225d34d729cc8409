"""The checks of ``bench/gpu.py``: errors against float64, and properties that only a GPU shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops
from moe_fast.losses.chunk_budget import kept_for_backward

from .gpu_times import BASE, DRY, captured, with_router
from .problem import BOUNDS, LOADS, NAMES, Problem, Shape, covering, relative_error, timed

# Shapes of real models, edge cases, and widths that are not multiples of 16.
GRID = dict(
    tokens=(0, 1, 257, 4099),
    experts=(1, 2, 3, 5, 6, 7, 8, 16),
    k=(1, 2, "E"),
    dim=(64, 384, 389, 512, 768, 1024),
    dtype=tuple(BOUNDS),
    gated=(False, True),
    bias=(True, False),
    load=LOADS,
    recompute=(None, "up"),
)
DRY_GRID = {
    **GRID,
    "tokens": (0, 1, 37),
    "experts": (1, 3),
    "k": (1, "E"),
    "dim": (13, 16),
    "dtype": (torch.float32, torch.bfloat16),
}
ROUTES = dict(
    tokens=(1, 257, 4099),
    experts=(2, 3, 8, 16),
    k=(1, 2, "E"),
    dim=(64, 389, 768),
    dtype=tuple(BOUNDS),
    mode=("token_topk", "sentence_topk", "dense"),
    weight_mode=("renormalize", "probability", "straight_through"),
)
DRY_ROUTES = {**ROUTES, "tokens": (1, 37), "experts": (2, 5), "dim": (13,)}
# More than 2^31 elements of z.
FAR = replace(BASE, tokens=720_000)
# Logits are sums in float32: if two are closer than this, the choice may differ from float64's.
_MARGIN = 1e-4


# Bytes of the blocks that are filled with NaN. The allocator keeps what is smaller than 1 MiB in
# another pool than the rest, and cuts small tensors from the free blocks there.
_LARGE_POOL = (1 << 30,)
_SMALL_POOL = tuple((256 << 10) * (1 + i % 2) for i in range(400))


def poison(device: torch.device) -> None:
    """Fill the memory that the allocator hands out next with NaN, for tensors of every size."""
    if device.type == "cuda":
        nan = float("nan")
        blocks = [torch.full((n // 4,), nan, device=device) for n in _LARGE_POOL + _SMALL_POOL]
        del blocks  # all are free now; none was reused for the next one


def check_grid(
    grid: Iterable[dict[str, Any]],
    check: Callable[[dict[str, Any], torch.device], dict[str, float]],
    device: torch.device,
    seconds: float,
    report: Callable[[dict[str, Any]], None] = lambda so_far: None,
) -> dict[str, Any]:
    """Check cases until the time is over.

    Args:
        report: is called after every case, with what will be returned if it is the last one.

    Returns:
        How many cases were checked, how many there are, the largest error of each tensor divided by
        its bound, and the failures.
    """
    grid, start = list(grid), time.monotonic()
    worst: dict[str, float] = {}
    failures: list[str] = []
    found: dict[str, Any] = {"checked": 0, "of": len(grid)}
    found |= {"error_over_bound": worst, "failures": failures}
    for settings in grid:
        if time.monotonic() - start > seconds:
            break
        found["checked"] += 1
        poison(device)
        try:
            shares = check(settings, device)
        except Exception as error:  # the other cases are worth checking
            failures.append(f"{settings}: {type(error).__name__}: {error}")
            shares = {}
        for name, share in shares.items():
            worst[name] = max(worst.get(name, 0.0), share)
            if not share <= 1:
                failures.append(f"{settings}: {name} {share:.3g} times its bound")
        report(found)
    return found


def check_experts(settings: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Return the errors of y and of every gradient, each divided by its bound."""
    problem = _experts_problem(settings, device)
    case, experts = problem.shape, problem.shape.experts
    expected = problem.outputs("torch", dtype=torch.float64)
    actual = problem.outputs("triton", recompute=settings["recompute"])
    errors = {n: relative_error(actual[n], e) / BOUNDS[case.dtype] for n, e in expected.items()}
    plans = [ops.plan(problem.top_k_index, experts, backend=b) for b in ("torch", "triton")]
    fields = ("expert_offsets", "row_to_token", "row_to_slot", "slot_to_row")
    plan = max(_differ(*(getattr(plan, field) for plan in plans)) for field in fields)
    return {**errors, "plan": plan}


def _experts_problem(settings: Mapping[str, Any], device: torch.device) -> Problem:
    settings = dict(settings)
    del settings["recompute"]
    experts, dim = settings["experts"], settings["dim"]
    k = experts if settings["k"] == "E" else min(settings["k"], experts)
    hidden = 4 * dim if dim % 2 == 0 else 2 * dim + 1
    return Problem(Shape(**{**settings, "k": k, "hidden": hidden}), device)


def _differ(actual: Tensor, expected: Tensor) -> float:
    """Return 0 if the tensors are equal, else infinity, which exceeds any bound."""
    return 0.0 if torch.equal(actual, expected) else float("inf")


def check_route(settings: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Return the errors of weights, logits and gradients, each divided by its bound.

    Ids and counts must be equal.
    """
    s = settings
    x, weight = _route_inputs(s, device)
    mask = torch.rand(s["tokens"], device=device) < 0.9
    k = _chosen(s)
    if s["mode"] == "token_topk" and k < s["experts"]:
        top = (x.double() @ weight.double().t()).sort(descending=True).values
        mask &= top[:, k - 1] - top[:, k] > _MARGIN
    expected, *grads = _routed(s, x.double(), weight.double(), mask, "torch")
    actual, *own = _routed(s, x, weight, mask, "triton")
    assert expected.router_logits is not None and actual.router_logits is not None  # learned
    bound, exact = BOUNDS[s["dtype"]], BOUNDS[torch.float32]
    return {
        "ids": _differ(actual.top_k_index, expected.top_k_index),
        "counts": _differ(actual.tokens_per_expert, expected.tokens_per_expert),
        "weights": relative_error(actual.top_k_weights, expected.top_k_weights) / exact,
        "logits": relative_error(actual.router_logits, expected.router_logits) / exact,
        "grad of x": relative_error(own[0], grads[0]) / bound,
        "grad of router_weight": relative_error(own[1], grads[1]) / bound,
    }


def _chosen(s: Mapping[str, Any]) -> int:
    return s["experts"] if s["k"] == "E" or s["mode"] == "dense" else s["k"]


def _route_inputs(s: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(s["tokens"], s["dim"], device=device).to(s["dtype"])
    weight = torch.randn(s["experts"], s["dim"], device=device) / s["dim"] ** 0.5
    return x, weight.to(s["dtype"])


def _routed(
    s: Mapping[str, Any], x: Tensor, weight: Tensor, mask: Tensor, backend: str
) -> tuple[ops.Routing, Tensor, Tensor]:
    """Return the route, and the gradients of x and of the router's weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    starts = torch.linspace(0, s["tokens"], 4, device=x.device).long()
    modes = dict(mode=s["mode"], weight_mode=s["weight_mode"])
    routing = ops.route(
        x, weight, _chosen(s), **modes, token_mask=mask, cu_seqlens=starts, backend=backend
    )
    torch.manual_seed(1)
    outputs = [t for t in (routing.top_k_weights, routing.router_logits) if t is not None]
    upstream = [torch.randn(t.shape, device=t.device).to(t.dtype) for t in outputs]
    grad_x, grad_weight = torch.autograd.grad(outputs, (x, weight), upstream)
    return routing, grad_x, grad_weight


def routes(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the combinations that exist; renormalize, for example, is combined with K > 1 only."""
    return [
        s
        for s in covering(grid)
        if (s["mode"] == "dense") == (s["weight_mode"] == "probability" and s["k"] == "E")
        and not (s["weight_mode"] == "straight_through" and s["k"] != 1)
        and not (s["weight_mode"] == "renormalize" and s["k"] == 1)
    ]


# --- other properties ----------------------------------------------------------------------------


def whole_layer(
    case: Shape, device: torch.device
) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Tensor]:
    """Return a function of x that runs route, plan and experts in both directions; and an x."""
    run, tensors, upstream = with_router(Problem(case, device, "triton"))
    leaves = _leaves(tensors)

    def both_ways(x: Tensor) -> tuple[Tensor, ...]:
        given = {**leaves, "x": x.detach().requires_grad_()}
        y = run(given)
        wanted = [t for t in given.values() if t is not None]
        return y.detach(), *torch.autograd.grad(y, wanted, upstream)

    return both_ways, torch.randn(case.tokens, case.dim, device=device).to(case.dtype)


def check_repeats(case: Shape, device: torch.device) -> str:
    """Check that two runs agree to the last bit."""
    run, x = whole_layer(case, device)
    check_equal(run(x), run(x), "a second run")
    return "bitwise equal"


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block, raise an error if something waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_no_sync(case: Shape, device: torch.device) -> str:
    """Check that forward and backward do not wait for the GPU."""
    run, x = whole_layer(case, device)
    run(x)
    with no_waiting():
        run(x)
    return "0 synchronisations"


def check_graph(case: Shape, device: torch.device) -> str:
    """Check that a captured CUDA graph gives the results of a plain run on new tokens.

    The new tokens are routed to other experts.
    """
    run, x = whole_layer(case, device)
    replay = captured(lambda: run(x))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        check_equal(replay(), run(x), "a replayed graph")
    return "bitwise equal on new tokens"


def check_far_offsets(case: Shape, device: torch.device) -> str:
    """Check that with more than 2^31 elements of z the last tokens are the same as alone."""
    assert case.tokens * case.k * case.width > 1 << 31, case
    problem, last = Problem(case, device), slice(-64, None)
    alone = Problem(replace(case, tokens=64), device)
    own = ("x", "top_k_weights")
    alone.tensors = {n: t[last].clone() if n in own else t for n, t in problem.tensors.items()}
    alone.plan = ops.plan(problem.top_k_index[last], case.experts)
    alone.upstream = problem.upstream[last].clone()
    many, few = problem.outputs("triton"), alone.outputs("torch", dtype=torch.float64)
    errors = {n: relative_error(many[n][last], few[n]) for n in ("y", "x", "top_k_weights")}
    if not max(errors.values()) <= BOUNDS[case.dtype]:
        raise AssertionError(f"{case}: {errors}")
    return f"{case.tokens * case.k * case.width:,} elements of z; errors {errors}"


def check_output_block(case: Shape, device: torch.device) -> dict[str, float]:
    """Return the errors of experts with the output block, each divided by its bound."""
    run = _output_block(case, device)
    expected, actual = run("torch", torch.float64), run("triton", None)
    return {n: relative_error(actual[n], e) / BOUNDS[case.dtype] for n, e in expected.items()}


def _output_block(
    case: Shape, device: torch.device
) -> Callable[[str, torch.dtype | None], dict[str, Tensor]]:
    """Return a function that gives the output and all gradients on a backend and in a dtype."""
    problem = Problem(case, device)
    size = (case.tokens, case.dim)
    made = [torch.randn(s, device=device).to(case.dtype) for s in (size, size[1:], size[1:])]
    block = dict(zip(("residual", "norm_weight", "norm_bias"), made, strict=True))

    def results(backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        def run(t: Mapping[str, Any]) -> Tensor:
            torch.manual_seed(1)  # seeds the dropped entries
            given: dict[str, Any] = {name: t[name] for name in (*NAMES, *block)}
            return ops.expert_mlp_norm(**given, plan=problem.plan, dropout=0.1, backend=backend)

        tensors = problem.tensors | block
        names = [name for name, tensor in tensors.items() if tensor is not None]
        found = timed(run, tensors, problem.upstream, True, dtype)()
        return dict(zip(["out", *names], found, strict=True))

    return results


def saved_bytes(case: Shape, device: torch.device) -> dict[str, int]:
    """Count the bytes that the forward keeps for the backward, without parameters and plan."""
    problem = Problem(case, device, "triton")
    leaves = _leaves(problem.tensors)
    known = [t for n, t in leaves.items() if n != "x" and t is not None]
    with kept_for_backward([*known, *problem.plan.indices]) as found:
        y = problem.forward(leaves)
    del y
    size = case.dtype.itemsize
    rows = case.tokens * case.k
    return {
        "saved": sum(found.values()),
        "x_and_z": size * (case.tokens * case.dim + rows * case.width),
    }


def _leaves(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Copy the tensors, with ``requires_grad``."""
    return {n: None if t is None else t.clone().requires_grad_() for n, t in tensors.items()}


def check_equal(actual: Any, expected: Any, what: str) -> None:
    """Raise unless all tensors of two results agree to the last bit."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=0, msg=lambda found: f"{what} differs: {found}"
    )


# --- what is compiled beforehand -----------------------------------------------------------------

# Cases of the grids whose kernels are compiled beforehand; later ones compile theirs as they come.
_AHEAD = {"experts": 64, "route": 32, "output block": 6}
_SMALL = replace(BASE, tokens=4099)


def grids(dry: bool) -> dict[str, tuple[list[dict[str, Any]], float]]:
    """Return the cases of each grid, and its share of the time."""
    blocks = covering({"k": (1, 2), "dtype": tuple(BOUNDS)})
    return {
        "experts": (covering(DRY_GRID if dry else GRID), 0.55),
        "route": (routes(DRY_ROUTES if dry else ROUTES), 0.2),
        "output block": (blocks, 0.1),
    }


def check_block(settings: dict[str, Any], device: torch.device) -> dict[str, float]:
    """:func:`check_output_block` at a small shape with other settings."""
    base = DRY if device.type == "cpu" else _SMALL
    return check_output_block(replace(base, **settings), device)


CHECKS = {"experts": check_experts, "route": check_route, "output block": check_block}


def items(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The launches of the first cases of each grid."""
    found = grids(dry=False)
    for number, settings in enumerate(found["experts"][0][: _AHEAD["experts"]]):
        yield f"experts {number}", partial(launch_experts, settings, device)
    for number, settings in enumerate(found["route"][0][: _AHEAD["route"]]):
        yield f"route {number}", partial(launch_route, settings, device)
    for number, settings in enumerate(found["output block"][0][: _AHEAD["output block"]]):
        run = _output_block(replace(_SMALL, **settings), device)
        yield f"output block {number}", partial(run, "triton", None)


def property_items(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The launches of the checks of properties."""
    run, x = whole_layer(BASE, device)
    yield "whole layer", lambda: run(x)
    yield "far offsets", lambda: Problem(FAR, device).outputs("triton")


def launch_experts(settings: Mapping[str, Any], device: torch.device) -> None:
    """Launch plan, forward and backward of a case of :data:`GRID`, without a comparison."""
    problem = _experts_problem(settings, device)
    problem.outputs("triton", recompute=settings["recompute"])
    ops.plan(problem.top_k_index, problem.shape.experts, backend="triton")


def launch_route(settings: Mapping[str, Any], device: torch.device) -> None:
    """Launch forward and backward of a case of :data:`ROUTES`, without a comparison."""
    x, weight = _route_inputs(settings, device)
    mask = torch.empty(settings["tokens"], dtype=torch.bool, device=device)
    _routed(settings, x, weight, mask, "triton")
