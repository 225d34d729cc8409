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


def test_small_numbers_keep_their_digits():
    """A temperature of 0.02 moves by less than 1e-4 between logs."""
    means = RunningMeans()
    means.add({"temperature": torch.tensor(0.019987654), "accuracy": torch.tensor(2 / 3)})
    assert means.pop() == {"temperature": 0.0199877, "accuracy": 0.666667}


def test_keeps_no_graph_and_no_reference():
    means = RunningMeans()
    value = torch.tensor(1.0, requires_grad=True)
    means.add({"x": value})
    with torch.no_grad():
        value.fill_(5.0)  # what the loss does next must not change what was added
    means.add({"x": value * 1.0})
    assert means.pop() == {"x": 3.0}


def test_processes_may_have_seen_other_metrics_and_other_numbers_of_them():
    means = RunningMeans()
    means.add({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    other = {"b": (9.0, 2), "c": (0.25, 1)}
    assert means.pop(lambda own: [*own, other]) == {
        "a": 1.0,
        "b": pytest.approx(11 / 3, abs=1e-4),
        "c": 0.25,
    }
