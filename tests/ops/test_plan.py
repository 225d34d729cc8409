"""plan: the order in which experts see their rows, on every backend that is built."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops

from . import oracle
from .helpers import assert_says, opcheck_calls, property_test

FIELDS = ["expert_offsets", "row_to_token", "row_to_slot", "slot_to_row"]


@pytest.fixture(params=ops.available_backends("plan"))
def backend(request) -> str:
    return request.param


def bound(num_slots: int, num_experts: int, block: int) -> int:
    """Rows of a tile schedule: known from shapes alone, so that nobody waits for the device."""
    return math.ceil(max(num_slots - num_experts + 1, 0) / block) + num_experts - 1


def assert_same_plan(ours: ops.RoutingPlan, theirs: oracle.OraclePlan) -> None:
    for field in FIELDS:
        tensor = getattr(ours, field)
        assert tensor.dtype == torch.int64, field
        assert tensor.tolist() == getattr(theirs, field), field
    assert ours.tiles.keys() == theirs.tiles.keys()
    num_slots, num_experts = len(theirs.row_to_slot), len(theirs.expert_offsets) - 1
    for block, schedule in theirs.tiles.items():
        tiles = ours.tiles[block]
        assert tiles.dtype == torch.int64
        assert tiles.shape == (bound(num_slots, num_experts, block), 2)
        assert tiles.tolist() == schedule + [[-1, -1]] * (tiles.shape[0] - len(schedule))


def test_worked_example(backend):
    """6 tokens, 3 experts, K = 2; token 5 is padding (id 3 = E)."""
    top_k_index = torch.tensor([[0, 2], [2, 0], [1, 0], [2, 1], [2, 0], [3, 3]])
    plan = ops.plan(top_k_index, 3, block_sizes=(3, 4), backend=backend)
    #                                       expert 0  | 1  | expert 2  | skipped
    assert plan.expert_offsets.tolist() == [0, 4, 6, 10]
    assert plan.row_to_slot.tolist() == [0, 3, 5, 9, 4, 7, 1, 2, 6, 8, 10, 11]
    assert plan.row_to_token.tolist() == [0, 1, 2, 4, 2, 3, 0, 1, 3, 4, 5, 5]
    assert plan.slot_to_row.tolist() == [0, 6, 7, 1, 4, 2, 8, 5, 9, 3, -1, -1]
    # (first row, expert); the bound is ceil((12 - 3 + 1) / 3) + 3 - 1 = 6 tiles of 3 rows.
    assert plan.tiles[3].tolist() == [[0, 0], [3, 0], [4, 1], [6, 2], [9, 2], [-1, -1]]
    assert plan.tiles[4].tolist() == [[0, 0], [4, 1], [6, 2], [-1, -1], [-1, -1]]


@property_test
@given(
    num_experts=st.sampled_from([1, 2, 3, 5, 7, 8, 16]),
    k=st.sampled_from([1, 2, 99]),
    num_tokens=st.sampled_from([0, 1, 2, 7, 33]),
    skipping=st.booleans(),
    backend=st.sampled_from(ops.available_backends("plan")),
    seed=st.integers(0, 999),
)
def test_any_shape_equals_the_oracle(num_experts, k, num_tokens, skipping, backend, seed):
    g = torch.Generator().manual_seed(seed)
    shape = (num_tokens, min(k, num_experts))
    top_k_index = torch.randint(0, num_experts + 3 * skipping, shape, generator=g)
    blocks = (1, 2, 3, 16, 128)
    assert_same_plan(
        ops.plan(top_k_index, num_experts, block_sizes=blocks, backend=backend),
        oracle.plan(top_k_index, num_experts, block_sizes=blocks),
    )


@pytest.mark.parametrize("expert", [0, 2, 4, 5, 1 << 40])
def test_all_tokens_to_one_expert(backend, expert):
    """The first, a middle, the last expert; nobody (id E, and any larger id)."""
    top_k_index = torch.full((9, 1), expert)
    plan = ops.plan(top_k_index, 5, block_sizes=(2, 4), backend=backend)
    assert_same_plan(plan, oracle.plan(top_k_index, 5, block_sizes=(2, 4)))


def test_the_tile_bound_holds_and_is_reached(backend):
    """Worst case: all experts but one hold one row, so that every tile but theirs is full."""
    for block in (1, 2, 3, 8):
        for num_experts in (1, 2, 5):
            for full in range(4):
                # one row each, and what is left to expert 0 ends one row into its last tile
                rows_of_0 = full * block + 1
                ids = [0] * rows_of_0 + list(range(1, num_experts))
                plan = ops.plan(
                    torch.tensor(ids)[:, None], num_experts, block_sizes=(block,), backend=backend
                )
                assert (plan.tiles[block] >= 0).all()  # no padding left: the bound is tight


def test_a_permutation_and_its_inverse(backend):
    top_k_index = torch.randint(0, 9, (50, 3))
    plan = ops.plan(top_k_index, 7, backend=backend)
    valid = int(plan.expert_offsets[-1])
    assert valid == int((top_k_index < 7).sum())
    assert torch.equal(plan.row_to_slot.sort().values, torch.arange(150))
    assert torch.equal(plan.slot_to_row[plan.row_to_slot[:valid]], torch.arange(valid))
    assert torch.equal(plan.row_to_token, plan.row_to_slot // 3)
    experts = top_k_index.flatten()[plan.row_to_slot]
    assert torch.equal(experts[:valid], experts[:valid].sort(stable=True).values)


def test_int32_and_strided_ids(backend):
    ids = torch.randint(0, 5, (3, 20))
    expected = oracle.plan(ids.T[::2], 4)
    assert_same_plan(ops.plan(ids.T[::2], 4, backend=backend), expected)
    assert_same_plan(ops.plan(ids.T[::2].to(torch.int32), 4, backend=backend), expected)
    one = torch.tensor([[2]]).expand(6, 2)
    assert_same_plan(ops.plan(one, 4, backend=backend), oracle.plan(one, 4))


def test_of_a_route(backend):
    x, mask = torch.randn(3, 4, 5), torch.rand(3, 4) < 0.6
    routing = ops.route(x, torch.randn(4, 5), 2, token_mask=mask)
    plan = ops.plan(routing.top_k_index, 4, backend=backend)
    assert torch.equal(plan.expert_offsets.diff(), routing.tokens_per_expert)


def test_opcheck():
    ids = torch.tensor([[0, 2], [2, 3], [1, 0]])
    opcheck_calls(lambda: ops.plan(ids, 3, backend="torch"), {"plan"})


def test_compiles_as_one_graph():
    torch.compiler.reset()

    def function(ids):
        plan = ops.plan(ids, 4, block_sizes=(3,))
        return [*(getattr(plan, field) for field in FIELDS), plan.tiles[3]]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (7, 12):
        ids = torch.randint(0, 5, (num_tokens, 2))
        for actual, expected in zip(compiled(ids), function(ids), strict=True):
            assert torch.equal(actual, expected)


IDS = torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(top_k_index=IDS[0]), ["top_k_index", "[2]", "[T, K]"]),
        (dict(top_k_index=IDS[None]), ["top_k_index", "[1, 2, 2]", "[T, K]"]),
        (dict(top_k_index=IDS.float()), ["top_k_index", "float32", "int64"]),
        (dict(top_k_index=IDS.bool()), ["top_k_index", "bool", "int64"]),
        (dict(top_k_index=IDS - 1), ["top_k_index", "-1", "negative"]),
        (dict(top_k_index=[[0, 1]]), ["top_k_index", "tensor", "list"]),
        (dict(num_experts=3.0), ["num_experts", "int", "3.0"]),
        (dict(num_experts=0), ["num_experts", "0", "1"]),
        (dict(num_experts=-2), ["num_experts", "-2", "1"]),
        (dict(block_sizes=(16, 0)), ["block_sizes", "0", "1"]),
        (dict(block_sizes=(1.5,)), ["block_sizes", "int", "1.5"]),
        (dict(block_sizes=(-4,)), ["block_sizes", "-4", "1"]),
        (dict(backend="cuda"), ["backend", "cuda", "auto", "torch"]),
    ],
)
def test_bad_input(arguments, says):
    with pytest.raises((ValueError, TypeError)) as error:
        ops.plan(**(dict(top_k_index=IDS, num_experts=3) | arguments))
    assert_says(error, *says)
