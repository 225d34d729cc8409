"""Each product of the expert MLP alone, for ``bench.gpu``: time, share of the floor, registers.

Times are those of a replayed CUDA graph. The registers and spills are what the driver says of the
kernels that a product launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from .gpu_compile import Item
from .gpu_times import BASE, Ceilings, Settings, products_work, with_router
from .problem import Problem, Shape, timed


@dataclass(frozen=True)
class Piece:
    """A part of forward and backward: its launcher, and its least work if it is a product."""

    name: str
    run: Callable[[], Any]
    flop: float | None = None
    moved: float | None = None


def pieces(shape: Shape, device: torch.device) -> Iterator[Piece]:
    """The six products, by each implementation that can compute them; then the passes around."""
    from moe_fast.triton_ops import tune

    work, problem = products_work(shape, backward=True), _tuned(shape)
    for product in tune.products(problem, device):
        name, least = product.name, work[product.name]
        ours = tune.candidates(problem, product, device)[0]
        yield Piece(f"{name}, triton", partial(product.launch, ours), *least)
        theirs = tune.by_grouped_mm(problem, product, device)
        if theirs is not None:
            yield Piece(f"{name}, grouped_mm", partial(product.launch, theirs), *least)
    yield from _passes(shape, device)


def _tuned(shape: Shape) -> Any:
    from moe_fast.triton_ops import tune

    names = ("tokens", "experts", "k", "dim", "hidden", "dtype", "gated")
    return tune.Problem(**{name: getattr(shape, name) for name in names})


def _passes(shape: Shape, device: torch.device) -> Iterator[Piece]:
    """The passes that only move data, by the bytes that each must move."""
    from moe_fast.triton_ops.column_sum import column_sum
    from moe_fast.triton_ops.combine import combine
    from moe_fast.triton_ops.padded_plan import pad_plan, sort_rows
    from moe_fast.triton_ops.plan import plan
    from moe_fast.triton_ops.router_grad import router_grad

    problem = Problem(shape, device, "triton")
    t, slots = problem.tensors, shape.tokens * shape.k
    order = plan(problem.top_k_index, shape.experts)[:3]
    a = shape.dtype.itemsize * shape.tokens * shape.dim
    dots = torch.rand(shape.hidden // 128 or 1, slots, device=device)
    weights = t["top_k_weights"]
    padded = pad_plan(order)
    yield Piece("pad_plan", lambda: pad_plan(order), moved=7 * 8 * slots)
    yield Piece("sort_rows", lambda: sort_rows(t["x"], padded), moved=2 * a * shape.k)
    yield Piece("plan", lambda: plan(problem.top_k_index, shape.experts), moved=5 * 8 * slots)
    yield Piece("column_sum", lambda: column_sum(problem.upstream, weights, order), moved=a)
    yield Piece(
        "router_grad",
        lambda: router_grad(
            dots, None, problem.upstream, t["down_proj_bias"], weights, order
        ),
        moved=a + dots.nbytes,
    )  # fmt: skip
    twice = plan(torch.cat([problem.top_k_index] * 2, 1), shape.experts)[3]
    rows = torch.randn(2 * slots, shape.dim, device=device).to(shape.dtype)
    yield Piece(
        "combine, twice as many slots",
        lambda: combine(rows, twice, torch.cat([weights] * 2, 1), 2 * shape.k),
        moved=(2 * shape.k + 1) * a,
    )
    run, tensors, upstream = with_router(problem)
    for backward, name in ((False, "layer, forward"), (True, "layer, forward + backward")):
        yield Piece(name, timed(run, tensors, upstream, backward))


def items(device: torch.device) -> Iterator[Item]:
    """The launches of the part ``kernels``."""
    for piece in pieces(BASE, device):
        yield piece.name, piece.run


def tuner_items(device: torch.device) -> Iterator[Item]:
    """The launches of the tuner's configurations."""
    from moe_fast.triton_ops import tune

    problem = _tuned(BASE)
    for product in tune.products(problem, device):
        for config in tune.candidates(problem, product, device):
            yield f"{product.name} {config}", partial(product.launch, config)


@contextlib.contextmanager
def launched() -> Iterator[dict[str, dict[str, int]]]:
    """Within the block, note what the kernels that are launched take: registers, shared memory."""
    from triton.runtime.jit import JITFunction

    launch, found = JITFunction.run, dict[str, dict[str, int]]()

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled = launch(self, *args, **kwargs)
        if compiled is not None:
            found[self.__name__] = {
                "registers": compiled.n_regs,
                "spills": compiled.n_spills,
                "shared_memory": compiled.metadata.shared,
            }
        return compiled

    with mock.patch.object(JITFunction, "run", run):
        yield found


def measure(piece: Piece, settings: Settings, ceilings: Ceilings) -> dict[str, Any]:
    """Return milliseconds, floor, share of the floor, and what the kernels take."""
    kernels: dict[str, dict[str, int]] = {}
    if settings.dry:
        piece.run()
    else:
        with launched() as kernels:
            piece.run()
    seconds = settings.seconds(settings.captured(piece.run))
    found: dict[str, Any] = {"ms": 1e3 * seconds, "kernels": dict(kernels)}
    if piece.moved is not None:
        least = max((piece.flop or 0) / ceilings.flops, piece.moved / ceilings.bandwidth)
        found |= {"floor_ms": 1e3 * least, "share_of_floor": least / seconds}
    if piece.flop is not None:
        found["tflops"] = piece.flop / seconds / 1e12
    return found


def kernel_times(run: Callable[[], Any], repeats: int = 5) -> list[dict[str, Any]]:
    """Return name and mean microseconds of each kernel that a call launches, in their order."""
    from torch.autograd import DeviceType

    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    if not events or len(events) % repeats:
        raise RuntimeError(f"{repeats} equal calls gave {len(events)} kernels")
    per_call = len(events) // repeats
    return [
        {
            "kernel": events[i].name[:80],
            "us": sum(e.device_time for e in events[i::per_call]) / repeats,
        }
        for i in range(per_call)
    ]


def step_times(shape: Shape, settings: Settings) -> list[dict[str, Any]]:
    """Return the times of the kernels of one forward and backward of the experts, in order."""
    problem = settings.problem(replace(shape))
    return kernel_times(timed(problem.forward, problem.tensors, problem.upstream, True))
