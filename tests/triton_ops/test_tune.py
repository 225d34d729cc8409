"""The search for tile sizes, on invented costs; tests/triton_ops/interpreted runs it on kernels."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.helpers import assert_says

pytest.importorskip("triton", reason="triton is not installed")

from moe_fast.triton_ops import tune
from moe_fast.triton_ops.config import Config

START = Config(128, 128, 64, 8, 3, 8)


def distance(config: Config) -> float:
    """Least at 64, 256, 32, 4, 5, 1, by descriptors."""
    best = dict(block_m=64, block_n=256, block_k=32, num_warps=4, num_stages=5, group_m=1)
    steps = sum(abs(math.log2(getattr(config, n) / v)) for n, v in best.items())
    return 1 + steps + (not config.descriptors)


def test_neighbours_differ_in_one_setting_by_one_step():
    found = list(tune.neighbours(START))
    assert len(found) == len(set(found)) == 12  # num_warps has no step up
    for config in found:
        changed = [n for n, value in vars(config).items() if value != getattr(START, n)]
        assert len(changed) == 1
    # 2 is between steps: a table may hold it, and the search goes on from there.
    assert Config(group_m=1) in tune.neighbours(Config(group_m=2))


def test_descent_reaches_the_minimum():
    tried = tune.descend(START, distance, lambda: False)
    assert min(tried, key=tried.get) == Config(64, 256, 32, 4, 5, 1, True)
    assert next(iter(tried)) == START
    assert len(tried) < 60


def test_descent_ignores_noise_and_what_does_not_fit():
    assert len(tune.descend(START, lambda c: 1 if c == START else 0.99, lambda: False)) == 13
    costs = tune.descend(START, lambda c: 1 if c == START else math.inf, lambda: False)
    assert min(costs, key=costs.get) == START


def test_descent_stops_when_time_is_up():
    calls = iter([False, False, True])
    assert len(tune.descend(START, distance, lambda: next(calls))) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(tokens=0), ["tokens", "at least 1", 0]),
        (dict(hidden=-1), ["hidden", -1]),
        (dict(target="up"), ["target", "intermediate", "up"]),
        (dict(k=9), ["k", "experts = 8", 9]),
        (dict(dtype=torch.float64), ["dtype", "bfloat16", "float64"]),
    ],
)
def test_bad_problems(change, says):
    good = dict(tokens=64, experts=8, k=1, dim=16, hidden=32, dtype=torch.bfloat16)
    with pytest.raises(ValueError) as error:
        tune.Problem(**(good | change))
    assert_says(error, *says)
