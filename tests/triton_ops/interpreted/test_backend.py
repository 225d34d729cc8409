"""The backend where Triton interprets: on request alone, with the reference's errors."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops
from moe_fast.ops import backends


@pytest.mark.parametrize("op", ["route", "plan", "expert_mlp", "expert_linear", "info_nce"])
def test_the_interpreter_is_never_chosen_by_itself(op):
    def chosen(backend):
        return backends.select(op, backend, torch.device("cpu"))

    assert chosen("triton") is not chosen("torch")
    assert chosen(None) is not chosen("triton")


def test_bad_values_are_refused_as_by_the_reference():
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        ops.plan(torch.tensor([[-1]]), 2, backend="triton")
    with pytest.raises(ValueError, match="NaN or infinite; got"):
        ops.route(torch.full((1, 3), float("nan")), torch.ones(2, 3), 1, backend="triton")
