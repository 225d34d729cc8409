"""The native kernels on a GPU, against the CPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops
from moe_fast.ops import native

from .helpers import DTYPES, TOLERANCES, assert_close, assert_gradients_close, gradients, leaves

if not torch.cuda.is_available() or native.why_unavailable("cuda") is not None:
    pytest.skip("needs a GPU and the native library's CUDA half", allow_module_level=True)

FIELDS = ("expert_offsets", "row_to_token", "row_to_slot", "slot_to_row")


def assert_same_plan(top_k_index: torch.Tensor, num_experts: int) -> None:
    expected = ops.plan(top_k_index.cpu(), num_experts, backend="torch")
    actual = ops.plan(top_k_index.cuda(), num_experts, backend="cpp")
    for field in FIELDS:
        assert torch.equal(getattr(actual, field).cpu(), getattr(expected, field)), field


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("tokens", "k", "experts"),
    [
        (0, 2, 4),
        (1, 1, 1),
        (97, 7, 7),
        (4096, 2, 8),
        (50_001, 3, 5),
        (131_072, 2, 8),
        (20_000, 1, 1024),
        (300, 2, 5000),  # counters in global memory
        (2_000_003, 1, 16),
    ],
)
def test_plan(tokens, k, experts, dtype):
    assert_same_plan(torch.randint(0, experts + 2, (tokens, k)).to(dtype), experts)


def test_negative_ids_are_skipped():
    ids = torch.tensor([[0, -1], [2, 1], [-(2**63), 0]])
    actual = ops.plan(ids.cuda(), 2, backend="cpp")
    expected = ops.plan(torch.where(ids < 0, 2, ids), 2, backend="torch")
    assert torch.equal(actual.slot_to_row.cpu(), expected.slot_to_row)


def test_two_launches_and_no_synchronisation():
    ids = torch.randint(0, 8, (5000, 2), device="cuda")
    ops.plan(ids, 8, backend="cpp")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            ops.plan(ids, 8, backend="cpp")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    launches = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launches) == 2, [e.name for e in launches]


def test_in_a_captured_graph():
    ids = torch.randint(0, 8, (5000, 2), device="cuda")
    x = torch.randn(5000, 64, device="cuda")
    ops.gather_rows(x, ops.plan(ids, 8, backend="cpp"), backend="cpp")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = ops.plan(ids, 8, backend="cpp")
        rows = ops.gather_rows(x, plan, backend="cpp")
    for _ in range(3):
        ids.random_(0, 9)
        graph.replay()
        expected = ops.plan(ids.cpu(), 8, backend="torch")
        for field in FIELDS:
            assert torch.equal(getattr(plan, field).cpu(), getattr(expected, field))
        assert torch.equal(rows.cpu(), ops.gather_rows(x.cpu(), expected, backend="torch"))


def test_on_the_current_stream():
    ids = torch.zeros(100_000, 2, dtype=torch.int64, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows must wait for it
        ids.fill_(1)
        plan = ops.plan(ids, 2, backend="cpp")
    stream.synchronize()
    assert plan.expert_offsets.tolist() == [0, 0, 200_000]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 64, 770, 768])
def test_rows(dim, dtype):
    ids = torch.randint(0, 6, (301, 3))
    plan = ops.plan(ids.cuda(), 5, backend="cpp")
    exact_plan = ops.plan(ids, 5)
    host = leaves(x=torch.randn(301, dim).to(dtype), weights=torch.rand(301, 3))
    device = leaves(**{n: t.cuda() for n, t in host.items()})
    exact = leaves(**{n: t.double() for n, t in host.items()})

    def run(tensors, used, backend):
        rows = ops.gather_rows(tensors["x"], used, backend=backend)
        return ops.combine_rows(rows, tensors["weights"], used, backend=backend)

    y, expected = run(device, plan, "cpp"), run(exact, exact_plan, "torch")
    upstream = torch.randn(301, dim).to(dtype)
    assert_close(y.cpu(), expected, TOLERANCES[dtype])
    grads = gradients([y], [upstream.cuda()], device)
    assert_gradients_close(
        {n: g.cpu() for n, g in grads.items()},
        gradients([expected], [upstream], exact),
        TOLERANCES[dtype],
    )


def test_the_gradient_of_a_sum():
    """It is an expanded tensor, whose strides are 0."""
    ids = torch.randint(0, 6, (301, 2))
    plan, exact_plan = ops.plan(ids.cuda(), 5, backend="cpp"), ops.plan(ids, 5)
    x, weights = torch.randn(301, 64), torch.rand(301, 2)
    device = leaves(x=x.cuda(), weights=weights.cuda())
    exact = leaves(x=x.double(), weights=weights.double())
    found = {}
    for tensors, used, backend in ((device, plan, "cpp"), (exact, exact_plan, "torch")):
        rows = ops.gather_rows(tensors["x"], used, backend=backend)
        ops.combine_rows(rows, tensors["weights"], used, backend=backend).sum().backward()
        found[backend] = {name: tensor.grad.cpu() for name, tensor in tensors.items()}
    assert_gradients_close(found["cpp"], found["torch"], TOLERANCES[torch.float32])


def test_the_automatic_choice():
    """The library serves what Triton has no kernel for; both compute the same plan."""
    ids = torch.randint(0, 6, (301, 2), device="cuda")
    plans = [ops.plan(ids, 5, backend=backend) for backend in ("auto", "cpp")]
    for field in FIELDS:
        assert torch.equal(*(getattr(plan, field) for plan in plans)), field
    x = torch.randn(301, 64, device="cuda")
    assert torch.equal(*(ops.gather_rows(x, plans[1], backend=b) for b in ("auto", "cpp")))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_gpu_of_the_tensors():
    ids = torch.randint(0, 6, (5000, 2))
    x = torch.randn(5000, 64)
    expected = ops.plan(ids, 5, backend="torch")
    with torch.cuda.device(0):
        plan = ops.plan(ids.to("cuda:1"), 5, backend="cpp")
        rows = ops.gather_rows(x.to("cuda:1"), plan, backend="cpp")
    assert plan.row_to_slot.device == rows.device == torch.device("cuda", 1)
    assert torch.equal(plan.row_to_slot.cpu(), expected.row_to_slot)
    valid = slice(0, int(expected.expert_offsets[-1]))
    assert torch.equal(rows.cpu()[valid], x[expected.row_to_token][valid])
