"""What the native expert MLP keeps for its backward, and allocates on the way."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from moe_fast import ops

from .helpers import DTYPES, leaves, need_native_library, num_threads

need_native_library()

TOKENS, K, EXPERTS, DIM, HIDDEN = 256, 2, 4, 8, 512  # H = 64 D: what is S * H wide stands out
ROWS = TOKENS * K


def problem(dtype: torch.dtype, gated: bool) -> tuple[dict, ops.RoutingPlan]:
    """Leaves and a plan."""
    up = 2 * HIDDEN if gated else HIDDEN
    tensors = dict(
        x=torch.randn(TOKENS, DIM).to(dtype),
        up_proj=torch.randn(EXPERTS, up, DIM).to(dtype),
        down_proj=torch.randn(EXPERTS, DIM, HIDDEN).to(dtype),
        up_proj_bias=torch.randn(EXPERTS, up).to(dtype),
        down_proj_bias=torch.randn(EXPERTS, DIM).to(dtype),
        top_k_weights=torch.rand(TOKENS, K),
    )
    return leaves(**tensors), ops.plan(torch.randint(0, EXPERTS, (TOKENS, K)), EXPERTS)


def call(tensors: dict, plan: ops.RoutingPlan, **options) -> torch.Tensor:
    return ops.expert_mlp(*tensors.values(), plan, backend="cpp", **options)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [None, "up"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_x_and_z_are_saved(dtype, recompute, gated):
    tensors, plan = problem(dtype, gated)
    given = {t.data_ptr() for t in (*tensors.values(), *vars(plan).values()) if torch.is_tensor(t)}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() and tensor.data_ptr() not in given:
            saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call(tensors, plan, recompute=recompute, gated=gated)
    assert y.grad_fn is not None
    z = [] if recompute else [(ROWS, 2 * HIDDEN if gated else HIDDEN)]
    assert [tuple(t.shape) for t in saved.values()] == z
    assert all(t.dtype == dtype for t in saved.values())


def peak_bytes(function) -> int:
    """The most that torch's allocator gave out at once, above what it had given before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    now = most = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def test_the_measure_sees_what_is_allocated_and_freed():
    assert 4000 <= peak_bytes(lambda: torch.zeros(1000) + 1) <= 9000


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_else_is_as_large_as_z(dtype, threads):
    """Of forward and backward together, gradients of parameters aside."""
    tensors, plan = problem(dtype, gated=False)
    z = ROWS * HIDDEN * dtype.itemsize
    parameters = sum(t.nbytes for n, t in tensors.items() if n != "x")

    def step():
        y = call(tensors, plan)
        torch.autograd.grad(y, list(tensors.values()), torch.ones_like(y))

    with num_threads(threads):
        step()
        most = peak_bytes(step)
    assert z <= most < z + parameters + z / 2
