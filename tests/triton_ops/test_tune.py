"""The search for tile sizes, on invented costs; tests/triton_ops/interpreted runs it on kernels."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.helpers import assert_says

pytest.importorskip("triton", reason="triton is not installed")

from moe_fast.triton_ops import tune
from moe_fast.triton_ops.candidates import curated
from moe_fast.triton_ops.compile_ahead import compile_ahead
from moe_fast.triton_ops.config import BY_DESCRIPTORS, Config, heuristic, why_not
from moe_fast.triton_ops.plan import count_kernel, plan
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from bench.gpu_compile import instead_of_a_gpu

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


def test_descriptors_are_tried_before_tiles_that_rarely_fit():
    order = list(tune.neighbours(START))
    assert order[0].descriptors
    assert [c.block_m for c in order].index(256) > len(order) // 2


PRODUCTS = [("up", 3072, 768), ("linear", 768, 3072), ("linear_transposed", 768, 3072),
            ("grad_hidden", 3072, 768), ("grad_weight", 3072, 768), ("gated_up", 3072, 768),
            ("gated_grad_hidden", 3072, 768)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(("kernel", "n", "k"), PRODUCTS)
def test_a_dozen_candidates_that_all_fit(kernel, n, k, target, dtype):
    start = heuristic(kernel, dtype, target, n, k, 8192)
    found = curated(start, kernel, dtype, target, n, k)
    assert found[0] == start
    assert len(set(found)) == len(found) <= 12
    assert len(found) >= (6 if dtype == torch.bfloat16 and target != "gfx942" else 3)
    assert not any(why_not(c, kernel, dtype, target, n, k) for c in found)
    assert all(c.implementation == "triton" for c in found)
    with_descriptors = sum(c.descriptors for c in found)
    if target == "sm_90" and kernel in BY_DESCRIPTORS and dtype == torch.bfloat16:
        assert with_descriptors >= 3
    elif target != "sm_90":
        assert not with_descriptors


class Kernel:
    """A compiled kernel; its spills are known once it is loaded."""

    def __init__(self, spills: int, error: Exception | None = None):
        self.after, self.error, self.n_spills = spills, error, None

    @property
    def run(self):
        if self.error is not None:
            raise self.error
        self.n_spills = self.after


def test_what_spills_much_or_does_not_load_is_not_timed():
    assert tune.spills([Kernel(3), Kernel(7)]) == 7
    assert tune.spills([]) == 0
    assert tune.spills(RuntimeError("it does not compile")) == math.inf
    assert tune.spills([Kernel(0, OutOfResources(300_000, 232_448, "shared memory"))]) == math.inf


def test_configurations_are_judged_by_their_kernels(monkeypatch):
    spilled = {START: 0, Config(64, 64, 64): tune.MOST_SPILLS, Config(256, 256, 64): 999}
    theirs = Config(implementation="grouped_mm")
    launched, product = [], tune.Product("up", "up", 64, 64, launch=lambda c: launched.append(c))

    def compile_ahead(launches, workers):
        for launch in launches:
            launch()
        return [[Kernel(spilled[config])] for config in launched]

    monkeypatch.setattr(tune, "compile_ahead", compile_ahead)
    found = tune.compiles_well(product, [*spilled, theirs])
    assert found == [START, Config(64, 64, 64), theirs]
    assert launched == list(spilled)


def choice(before: Config, after: Config, **fastest) -> tune.Choice:
    return tune.Choice("down", before, after, 2.0, 1.0, 3, fastest)


def test_the_layer_is_timed_with_every_implementation():
    ours, theirs = Config(128, 256), Config(implementation="grouped_mm")
    choices = {
        "up": choice(START, ours, triton=(ours, 1.0)),
        "down": choice(START, theirs, triton=(ours, 1.5), grouped_mm=(theirs, 1.0)),
    }
    found = {
        name: [c.after for c in layer.values()] for name, layer in tune.layers(choices).items()
    }
    # "grouped_mm" is what was found: it is not timed twice.
    assert found == {"before": [START, START], "found": [ours, theirs], "triton": [ours, ours]}
    assert tune.layers(choices)["triton"]["down"].after_ms == 1.5
    assert tune.layers(choices)["before"]["down"].after_ms == 2.0


@pytest.mark.slow
def test_kernels_are_compiled_in_parallel_without_a_launch(monkeypatch, tmp_path):
    """For a GPU that is not there: a launch would fail. The second one has no such constant."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ids = torch.empty(4096, 2, dtype=torch.int64, device="meta")

    def refuse() -> None:
        raise ValueError("not with this configuration")

    def wrong() -> None:
        count_kernel[(1,)](ids, ids, 4096, 4, E_BLOCK=3, BLOCK=16)  # no power of two

    with instead_of_a_gpu():
        found = compile_ahead([lambda: plan(ids, 4), refuse, wrong], workers=2)
    assert [k.metadata.name for k in found[0]] == ["count_kernel", "base_kernel", "scatter_kernel"]
    assert all(k.asm["cubin"] for k in found[0])
    assert "not with this" in str(found[1]) and isinstance(found[2], CompilationError)
