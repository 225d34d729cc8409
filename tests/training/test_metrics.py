"""RunningMeans: averages that wait on the device."""

from __future__ import annotations

import pytest
import torch

from moe_fast.training.metrics import RunningMeans


def test_means_since_the_last_pop():
    means = RunningMeans()
    assert means.pop() == {}
    means.add({"accuracy": torch.tensor(0.5), "temperature": torch.tensor(0.1)})
    means.add({"accuracy": torch.tensor(1.0, dtype=torch.float64)})
    means.add({})
    assert means.pop() == {"accuracy": 0.75, "temperature": 0.1}
    means.add({"accuracy": torch.tensor(0.25)})
    assert means.pop() == {"accuracy": 0.25}
    assert means.pop() == {}


def test_keeps_no_graph_and_no_reference():
    means = RunningMeans()
    value = torch.tensor(1.0, requires_grad=True)
    means.add({"x": value})
    with torch.no_grad():
        value.fill_(5.0)  # what the loss does next must not change what was added
    means.add({"x": value * 1.0})
    assert means.pop() == {"x": 3.0}


def test_reduce_sees_all_means_at_once():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    seen = []

    def reduce(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.tolist())
        return values + 1

    assert means.pop(reduce) == pytest.approx({"a": 2.0, "b": 3.0})
    assert seen == [[1.0, 2.0]]
