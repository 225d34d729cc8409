"""A check runs once for all calls that look alike, and again for each that does not."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from moe_fast import ops
from moe_fast.ops import backends, checked_calls
from moe_fast.ops.checked_calls import once_per_signature

X = torch.zeros(3, 2)
PLAN = ops.plan(torch.tensor([[0], [1], [0]]), 2)


@pytest.fixture
def calls():
    """A check that counts its calls, and refuses what has 5 rows."""
    seen = []

    @once_per_signature
    def check(x, *args):
        seen.append((x, *args))
        if x.shape[0] == 5:
            raise ValueError("5 rows")

    return check, seen


def test_other_values_of_the_same_shape_are_not_checked_again(calls):
    check, seen = calls
    for x in (X, X + 1, torch.nn.Parameter(X, requires_grad=False)):
        check(x, PLAN, "gelu", None, torch.float32)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "changed",
    [
        (torch.zeros(4, 2), X, PLAN, 1),
        (X.double(), X, PLAN, 1),
        (X.clone().requires_grad_(), X, PLAN, 1),
        (X.to("meta"), X, PLAN, 1),
        (X, None, PLAN, 1),
        (X, X.half(), PLAN, 1),
        (X, X, dataclasses.replace(PLAN, expert_offsets=torch.zeros(4)), 1),
        (X, X, dataclasses.replace(PLAN, slot_to_row=PLAN.slot_to_row.int()), 1),
        (X, X, PLAN, 2),
        (X, X, PLAN, True),  # equal to 1
        (X, X, PLAN, 1.0),
        (X, X, PLAN, torch.float32),
    ],
)
def test_whatever_else_differs_is_checked(calls, changed):
    check, seen = calls
    check(X, X, PLAN, 1)
    check(*changed)
    assert len(seen) == 2


def test_a_plan_is_known_by_its_layout_unless_it_was_changed(calls):
    check, seen = calls
    for ids in ([[0], [1], [0]], [[1], [1], [1]]):
        check(X, ops.plan(torch.tensor(ids), 2))
    assert len(seen) == 1
    for other in (ops.plan(torch.tensor([[0], [1], [0]]), 3), ops.plan(torch.tensor([[0]]), 2)):
        check(X, other)
    assert len(seen) == 3
    changed = [dataclasses.replace(PLAN, row_to_token=torch.zeros(n).long()) for n in (3, 4, 4)]
    for plan in (*changed, ops.RoutingPlan(*PLAN.indices)):
        assert plan.layout is None
        check(X, plan)
    assert len(seen) == 5
    assert copy.deepcopy(PLAN).layout == PLAN.layout


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        torch.no_grad,
        lambda: ops.use_backend("torch"),
    ],
)
def test_the_state_around_a_call_is_part_of_the_signature(calls, around):
    check, seen = calls
    check(X)
    for _ in range(2):
        with around():
            check(X)
    assert len(seen) == 2


def test_what_was_found_out_is_given_again():
    found_out = once_per_signature(lambda x, name: object())
    first = found_out(X, "a")
    assert found_out(X + 1, "a") is first
    assert found_out(X, "b") is not first


def test_what_was_refused_is_refused_again(calls):
    check, seen = calls
    for _ in range(2):
        with pytest.raises(ValueError, match="5 rows"):
            check(torch.zeros(5, 2))
    assert len(seen) == 2


def test_what_has_no_signature_reaches_the_check(calls):
    check, seen = calls
    for args in ((X, ["a list"]), (X, dataclasses.replace(PLAN, row_to_slot=None))):
        check(*args)
        check(*args)
    assert len(seen) == 4


def test_memory_is_bounded(calls, monkeypatch):
    monkeypatch.setattr(checked_calls, "_MOST", 3)
    check, seen = calls
    for rows in (1, 2, 3, 4, 1, 4):
        check(torch.zeros(rows, 2))
    assert len(seen) == 5  # three were forgotten for the fourth, which is known still


def test_an_op_refuses_wrong_shapes_after_right_ones():
    weight, weights = torch.zeros(2, 4, 2), torch.ones(3, 1)
    assert ops.expert_linear(X, weight, None, weights, PLAN).shape == (3, 4)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.expert_linear(X, torch.zeros(2, 4, 3), None, weights, PLAN)
    with pytest.raises(TypeError, match="weight must have the dtype of x"):
        ops.expert_linear(X, weight.double(), None, weights, PLAN)
    with pytest.raises(TypeError, match="plan must be a RoutingPlan"):
        ops.expert_linear(X, weight, None, weights, PLAN.indices)


def test_what_only_looks_like_a_plan_is_refused_after_one():
    weight, weights = torch.zeros(2, 4, 2), torch.ones(3, 1)
    ops.expert_linear(X, weight, None, weights, PLAN)
    with pytest.raises(TypeError, match="plan must be a RoutingPlan"):
        ops.expert_linear(X, weight, None, weights, SimpleNamespace(**vars(PLAN)))


def test_what_another_thread_changed_meanwhile_is_not_remembered():
    found_out = []

    @once_per_signature
    def find_out(x):
        found_out.append(backends.default)
        if len(found_out) == 1:
            backends.default = "torch"  # as another thread's use_backend
        return backends.default

    before = backends.default
    try:
        assert find_out(X) == "torch"
    finally:
        backends.default = before
    assert find_out(X) == before


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_autocast_casts_no_integers(dtype):
    weight, weights = torch.zeros(2, 4, 2, dtype=dtype), torch.ones(3, 1)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="weight must have the dtype of x"),
    ):
        ops.expert_linear(X, weight, None, weights, PLAN)
