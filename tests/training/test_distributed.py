"""Two processes with gloo between them: what one alone does not show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed_runs import decomposing_run, exchange, single_domain_run, wrapped_run
from processes import Run
from safetensors.torch import load_file


def findings_of(folder: Path, target, *args, world_size: int = 2) -> list:
    folder.mkdir()
    Run(folder / "log", world_size, target, folder, *args).expect_success()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def test_the_exchanges_alone(tmp_path):
    for found in findings_of(tmp_path / "run", exchange):
        assert found == {
            "half": [0.5, 2.0**-51],  # the other process had none; float64 stays float64
            "both": [1.5, -1.5],
            "none": [None, None],
            "values": [5.0, [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]],
        }


@pytest.mark.parametrize(("accumulation", "streamed"), [(1, False), (2, False), (1, True)])
def test_two_half_batches_equal_a_whole_one(tmp_path, accumulation, streamed):
    """The loss's own parameters too, clipped, from process 0's start."""
    whole, settings = tmp_path / "whole", (accumulation, streamed)
    (logs,) = findings_of(whole, decomposing_run, 4, *settings, world_size=1)
    expected = load_file(whole / "0.safetensors")
    halves = tmp_path / "halves"
    for rank, theirs in enumerate(findings_of(halves, decomposing_run, 2, *settings)):
        state = load_file(halves / f"{rank}.safetensors")
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)
        assert len(theirs) == len(logs) == 24 // 4 // accumulation * 2 + 1
        for own, other in zip(logs[:-1], theirs[:-1], strict=True):
            for key in ("loss", "similarity", "grad_norm"):
                assert own[key] == pytest.approx(other[key], rel=1e-3, abs=1e-4), key
    assert expected["log_temperature"] != pytest.approx(-1.0, abs=1e-3)  # it has learned
    assert expected["unused"].tolist() == [1.0] * 3


def test_batches_of_one_domain_with_frozen_parts(tmp_path):
    """Experts without tokens in a process, or in both, and parameters that are not trained."""
    first, second = findings_of(tmp_path / "run", single_domain_run)
    assert (first.pop("saves"), second.pop("saves")) == (3, 0)  # process 0 alone writes
    assert first == second  # weights too, and the counts of both processes
    assert first["changed"] == first["trainable"]
    assert all("mlp" in name for name in first["trainable"])
    assert first["optimizer states"] == len(first["trainable"]) + 1  # and the temperature
    steps = [entry["step"] for entry in first["history"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    for entry in first["history"]:
        for tokens in entry["tokens"].values():
            assert 1 <= sum(count > 0 for count in tokens) <= 2  # one domain in each process
    total = sum(sum(entry["tokens"]["layer_0"]) for entry in first["history"])
    assert total == 2 * 24 * (4 + 2 + 5 + 2)  # epochs, rows, words and special tokens of a pair
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint-2", "checkpoint-4", "checkpoint-6"} <= names


def test_losses_around_losses(tmp_path):
    """The encoder is found wherever it is called `model`; elsewhere it is an error."""
    first, second = findings_of(tmp_path / "run", wrapped_run)
    assert first == second
    assert isinstance(first["Around"], float)
    assert first["Hidden"].startswith("Hidden does not hold the model as an attribute `model`")
