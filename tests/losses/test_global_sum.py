"""The router losses of two data-parallel processes are those of one with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddp_worker import Encoder, train
from loss_checks import assert_close
from safetensors.torch import load_file

from moe_fast.losses.global_sum import global_sum

WORKER = Path(__file__).parent / "ddp_worker.py"


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ddp")
    results = [folder / f"{rank}.safetensors" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), "2", folder / "rendezvous", result],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, result in enumerate(results)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return [load_file(result) for result in results]


def test_gradients_terms_and_running_joint_are_those_of_one_process(two_processes):
    expected = train(Encoder().double(), slice(0, 6))
    for results in two_processes:
        assert results.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(results[name], value.detach())
    routers = [value for name, value in expected.items() if "router" in name]
    assert all(gradient.abs().max() > 1e-3 for gradient in routers)


def test_the_halves_alone_would_give_something_else():
    """So that the test above cannot pass without the sums over processes."""
    expected = train(Encoder().double(), slice(0, 6))
    halves = [train(Encoder().double(), rows) for rows in (slice(0, 3), slice(3, 6))]
    name = "0.layers.0.router.weight"
    mean = sum(half[name] for half in halves) / 2
    assert (mean - expected[name]).abs().max() > 1e-3


def test_one_process_sums_nothing():
    x = torch.ones(3)
    assert global_sum(x) is x
