"""The backend where Triton interprets: on request alone, with the reference's errors."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops


def test_the_interpreter_is_never_chosen_by_itself():
    with torch.profiler.profile() as profile:
        ops.plan(torch.tensor([[0]]), 2)
        ops.plan(torch.tensor([[0]]), 2, backend="triton")
    plans = ("moe_fast::plan", "moe_fast_cpp::plan")  # the native one goes past the dispatcher
    called = [e.key for e in profile.key_averages() if e.key.startswith(plans)]
    assert len(called) == 2
    assert sum("plan_triton" in key for key in called) == 1


def test_bad_values_are_refused_as_by_the_reference():
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        ops.plan(torch.tensor([[-1]]), 2, backend="triton")
    with pytest.raises(ValueError, match="NaN or infinite; got"):
        ops.route(torch.full((1, 3), float("nan")), torch.ones(2, 3), 1, backend="triton")
