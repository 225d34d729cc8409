"""The router losses of two data-parallel processes are those of one with the whole batch.

So are those of a gradient cache in both, with chunks of unequal number.
"""

from __future__ import annotations

import pytest
import torch
from ddp_worker import Encoder, run, train
from loss_checks import assert_close
from processes import Run
from safetensors.torch import load_file

from moe_fast.losses.global_sum import global_sum

# Tokens per chunk, and whether parameters are sharded.
WAYS = {"plain": (None, False), "in chunks": (10, False), "in chunks, sharded": (10, True)}


@pytest.fixture(scope="module", params=WAYS.values(), ids=WAYS)
def two_processes(request, tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ddp")
    Run(folder / "log", 2, run, folder, *request.param).expect_success()
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


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
