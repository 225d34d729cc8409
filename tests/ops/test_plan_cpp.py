"""The native ``moe_fast_cpp::plan`` against torch's stable argsort.

Skipped where the library is not built, but with ``CI=true`` a missing library is a failure.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from .helpers import need_native_library, num_threads

need_native_library()

# From here on a large input is several chunks: see kMinSlotsPerChunk in plan.cpp.
LARGE = 3 * 16384


@pytest.fixture(params=[1, 3])
def threads(request) -> Iterator[int]:
    """Run a test with one thread and with several."""
    with num_threads(request.param):
        yield request.param


def expected(top_k_index: Tensor, num_experts: int) -> list[Tensor]:
    """The four index tensors, by sorting."""
    k = top_k_index.shape[1]
    bucket = top_k_index.flatten().long().clamp(max=num_experts)
    row_to_slot = bucket.argsort(stable=True)
    counts = torch.bincount(bucket, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    slot_to_row = row_to_slot.argsort().where(bucket < num_experts, -1)
    return [offsets, row_to_slot // k, row_to_slot, slot_to_row]


def assert_same(top_k_index: Tensor, num_experts: int) -> None:
    got = torch.ops.moe_fast_cpp.plan(top_k_index, num_experts)
    names = ("expert_offsets", "row_to_token", "row_to_slot", "slot_to_row")
    for name, ours, theirs in zip(names, got, expected(top_k_index, num_experts), strict=True):
        assert ours.dtype == torch.int64, name
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("tokens", "k", "experts"),
    [
        (0, 2, 4),
        (1, 1, 1),
        (5, 1, 1),
        (6, 2, 3),
        (97, 7, 7),
        (50, 2, 1024),
        (3, 1024, 1024),
        (LARGE, 1, 8),
        (LARGE // 2 + 1, 3, 5),
        (LARGE, 2, 1),
        (LARGE, 1, 1024),
        (LARGE, 1, 10 * LARGE),  # more counters than slots
    ],
)
def test_matches_a_stable_sort(tokens, k, experts, dtype, threads):
    # E and E + 1 are drawn too: skipped.
    assert_same(torch.randint(0, experts + 2, (tokens, k)).to(dtype), experts)


@pytest.mark.parametrize("value", [0, 3, 4, 2**31 - 1])
def test_all_slots_alike(value, threads):
    assert_same(torch.full((LARGE, 2), value, dtype=torch.int32), 4)


def test_worked_example():
    ids = torch.tensor([[0, 2], [2, 0], [1, 0], [2, 1], [2, 0], [3, 3]])
    offsets, row_to_token, row_to_slot, slot_to_row = torch.ops.moe_fast_cpp.plan(ids, 3)
    assert offsets.tolist() == [0, 4, 6, 10]
    assert row_to_slot.tolist() == [0, 3, 5, 9, 4, 7, 1, 2, 6, 8, 10, 11]
    assert row_to_token.tolist() == [0, 1, 2, 4, 2, 3, 0, 1, 3, 4, 5, 5]
    assert slot_to_row.tolist() == [0, 6, 7, 1, 4, 2, 8, 5, 9, 3, -1, -1]


@given(
    experts=st.integers(1, 40),
    k=st.integers(1, 5),
    ids=st.lists(st.integers(0, 45), max_size=60),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_any_ids(experts, k, ids, dtype):
    tokens = len(ids) // k
    assert_same(torch.tensor(ids[: tokens * k], dtype=dtype).reshape(tokens, k), experts)


def test_the_largest_id_is_skipped():
    assert_same(torch.tensor([[2**63 - 1, 0]]), 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_negative_id_is_named(dtype, threads):
    ids = torch.zeros(LARGE, 2, dtype=dtype)
    ids[-1, 1] = -7
    with pytest.raises(RuntimeError, match=rf"must not be negative; got -7 at \[{LARGE - 1}, 1\]"):
        torch.ops.moe_fast_cpp.plan(ids, 4)


@pytest.mark.parametrize(
    ("top_k_index", "experts", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), 2, r"must be \[T, K\]; got 1 dimensions"),
        (torch.zeros(4, 2), 2, "must be int64 or int32"),
        (torch.zeros(2, 4, dtype=torch.int64).t(), 2, "must be contiguous"),
        (torch.zeros(4, 2, dtype=torch.int64), 0, "num_experts must be at least 1; got 0"),
    ],
)
def test_refuses(top_k_index, experts, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moe_fast_cpp.plan(top_k_index, experts)
