"""The search on the kernels themselves, which are interpreted: what it finds is what is used."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from moe_fast.triton_ops import launch_config, tune, tuning_tables
from moe_fast.triton_ops.config import BY_GROUPED_MM, Config
from triton.runtime.errors import OutOfResources

from moe_fast import ops
from moe_fast.ops import tuning
from tests.ops.helpers import TOLERANCES, assert_close

GROUPED = Config(implementation="grouped_mm")
PROBLEM = tune.Problem(tokens=24, experts=3, k=2, dim=16, hidden=32, dtype=torch.float32)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv(tuning_tables.OWN_TABLES, str(tmp_path))
    tuning_tables.load_table.cache_clear()
    yield
    tuning_tables.load_table.cache_clear()


def by_size(launch, config: Config) -> float:
    """A timer by which small tiles are fast, and which launches nothing."""
    return float(config.block_m * config.block_n * config.block_k)


def run_backward(problem: tune.Problem) -> list:
    """Gradients of an expert MLP of the problem's shape, forward and backward."""
    width = 2 * problem.hidden if problem.gated else problem.hidden
    sizes = dict(x=(problem.tokens, problem.dim), w1=(problem.experts, width, problem.dim))
    x, w1 = (torch.randn(s, requires_grad=True) for s in sizes.values())
    w2 = torch.randn(problem.experts, problem.dim, problem.hidden, requires_grad=True)
    weights = torch.rand(problem.tokens, problem.k)
    ids = torch.randint(problem.experts, weights.shape)
    plan = ops.plan(ids, problem.experts)
    act = "silu" if problem.gated else "gelu"
    ops.expert_mlp(
        x, w1, w2, None, None, weights, plan, act=act, gated=problem.gated, backend="triton"
    ).square().sum().backward()
    return [t.grad for t in (x, w1, w2)]


@pytest.mark.parametrize("gated", [False, True])
def test_what_is_found_is_what_every_product_is_launched_with(gated, monkeypatch):
    problem = dataclasses.replace(PROBLEM, gated=gated)
    found = tune.search(problem, CPU, seconds=1e-9, timer=by_size)
    assert [c.product for c in found.values()] == [
        "up", "down", "grad_hidden", "grad_x", "grad_down", "grad_up",
    ]  # fmt: skip
    # The time was up at once: what is in use is kept.
    assert all(c.before == c.after for c in found.values())
    both = [1, 2, 1, 2, 2, 2]  # grouped_mm beside ours, where there is no epilogue
    assert [c.tried for c in found.values()] == both
    configs = {key: Config(16, 16, 16, group_m=number) for number, key in enumerate(found, 1)}
    path = tuning_tables.add_to_table(launch_config.gpu_name(CPU), configs)
    assert path.name == "interpreter.json"
    used = []
    parse = dict(tuning_tables.load_table("interpreter"))
    monkeypatch.setattr(launch_config, "load_table", lambda gpu: Recorded(parse, used))
    run_backward(problem)
    assert set(used) == set(found)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("target", "inner", "outer"), [("intermediate", 16, 64), ("output", 32, 16)]
)
def test_a_mixture_of_one_projection(target, inner, outer, k, monkeypatch):
    problem = dataclasses.replace(PROBLEM, target=target, gated=True, k=k)
    found = tune.search(problem, CPU, seconds=1e-9, timer=by_size)
    assert [c.product for c in found.values()] == ["linear", "grad_x", "grad_weight"]
    used = []
    table = {key: Config(16, 16, 16) for key in found}
    monkeypatch.setattr(launch_config, "load_table", lambda gpu: Recorded(table, used))
    x, weight = torch.randn(24, inner, requires_grad=True), torch.randn(3, outer, inner)
    weights = torch.rand(24, k)
    plan = ops.plan(torch.randint(3, (24, k)), 3)
    y = ops.expert_linear(x, weight.requires_grad_(), None, weights, plan, backend="triton")
    y.sum().backward()
    assert set(used) == set(found)


class Recorded(dict):
    """A table that remembers which entries were asked for."""

    def __init__(self, table, used):
        super().__init__(table)
        self.used = used

    def get(self, key):
        assert key in self, key
        self.used.append(key)
        return super().get(key)


def test_a_faster_configuration_is_chosen_and_gives_the_same():
    found = tune.search(PROBLEM, CPU, seconds=60, timer=by_size)
    for choice in found.values():
        assert choice.before == Config(32, 32, 32, 4, 1)
        assert choice.after == Config(16, 16, 16, 4, 1)
        assert (choice.before_ms, choice.after_ms) == (32.0**3, 16.0**3)


@pytest.mark.slow
def test_grouped_mm_is_chosen_where_it_is_faster_and_serves_forward_and_backward(monkeypatch):
    def timer(launch, config):
        return 1.0 if config.implementation == "grouped_mm" else 2.0

    found = tune.search(PROBLEM, CPU, seconds=1e-9, timer=timer)
    chosen = {c.product for c in found.values() if c.after.implementation == "grouped_mm"}
    assert chosen == {"down", "grad_x", "grad_down", "grad_up"}
    tuning_tables.add_to_table(
        launch_config.gpu_name(CPU), {key: c.after for key, c in found.items()}
    )
    # From the table's entry the search finds the way back.
    again = tune.search(PROBLEM, CPU, seconds=60, timer=by_size)
    assert all(c.after.implementation == "triton" for c in again.values())
    torch.manual_seed(0)
    grads = run_backward(PROBLEM)
    tuning_tables.load_table.cache_clear()
    monkeypatch.setattr(launch_config, "load_table", lambda gpu: {})
    torch.manual_seed(0)
    for ours, theirs in zip(grads, run_backward(PROBLEM), strict=True):
        assert_close(ours, theirs, TOLERANCES[torch.float32])


@pytest.mark.slow
def test_results_that_differ_are_not_chosen(monkeypatch):
    up = next(tune.products(PROBLEM, CPU))
    monkeypatch.setattr(tune, "products", lambda *_: [up])
    monkeypatch.setattr(tune, "_agree", lambda actual, expected: False)
    found = tune.search(PROBLEM, CPU, seconds=60, timer=by_size)
    assert all(choice.after == choice.before for choice in found.values())
    assert all(choice.tried > 10 for choice in found.values())


@pytest.mark.slow
def test_a_configuration_that_the_gpu_refuses_is_not_chosen():
    def timer(launch, config):
        if config.block_m == 16:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return by_size(launch, config)

    found = tune.search(PROBLEM, CPU, seconds=60, timer=timer)
    assert all(choice.after == Config(32, 16, 16, 4, 1) for choice in found.values())


@pytest.mark.slow
def test_what_descriptors_and_grouped_mm_refuse_is_not_chosen_and_other_errors_are_raised():
    def timer(launch, config):
        if config.descriptors or config.implementation == "grouped_mm":
            raise RuntimeError("refused")
        return by_size(launch, config)

    found = tune.search(PROBLEM, CPU, seconds=60, timer=timer)
    assert all(choice.after == Config(16, 16, 16, 4, 1) for choice in found.values())

    def broken(launch, config):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        tune.search(PROBLEM, CPU, seconds=60, timer=broken)


def test_times_are_of_launches():
    launched = []
    assert tune.milliseconds(launched.append, Config()) > 0
    assert launched == [Config()]


def test_seconds_must_be_positive():
    with pytest.raises(ValueError, match="seconds must be positive; got 0"):
        tune.search(PROBLEM, CPU, seconds=0)


@pytest.mark.parametrize("target", ["mlp", "output"])
@pytest.mark.parametrize("fastest", ["before", "found", "grouped_mm"])
def test_the_layer_decides_what_the_table_has(fastest, target, monkeypatch):
    """Whole layers are timed with the entries that they would be launched with."""
    problem = dataclasses.replace(PROBLEM, target=target)
    found = Config(16, 16, 16, 4, 1)

    def milliseconds(run, config):
        run(config)  # a whole layer, with the table on trial
        table = set(tuning_tables.load_table("interpreter").values())
        kind = "grouped_mm" if any(c.implementation == "grouped_mm" for c in table) else "before"
        return 1.0 if (kind if found not in table else "found") == fastest else 2.0

    def search(*arguments, **settings):
        keys = {product.name: product for product in tune.products(problem, CPU)}
        return {
            tuning_tables.table_key(p.kernel, p.n, p.k, 16, torch.float32): tune.Choice(
                name, Config(32, 32, 32, 4, 1), found, 2.0, 1.0, 3,
                {"triton": (found, 1.0), "grouped_mm": (GROUPED, 1.5)},
            )
            for name, p in keys.items()
            if p.kernel in BY_GROUPED_MM
        }  # fmt: skip

    monkeypatch.setattr(tune, "search", search)
    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    tuned = tuning.tune(16, 32, 3, 2, tokens=24, dtype=torch.float32, target=target, device="cpu")
    assert tuned.kept == fastest and set(tuned.layer_ms) == {"before", "found", "grouped_mm"}
    expected = {"before": Config(32, 32, 32, 4, 1), "found": found, "grouped_mm": GROUPED}[fastest]
    assert {choice.after for choice in tuned.choices.values()} == {expected}
    assert set(tuning_tables.load_table("interpreter").values()) == {expected}


def test_padded_rows_are_tuned_as_they_are_launched(monkeypatch):
    """The products agree with those of rows that are gathered, and have the launchers' keys."""
    monkeypatch.setattr(launch_config, "pads_experts", lambda *_: True)
    found = tune.search(PROBLEM, CPU, seconds=1e-9, timer=by_size)
    used = []
    table = {key: Config(16, 16, 16) for key in found}
    monkeypatch.setattr(launch_config, "load_table", lambda gpu: Recorded(table, used))
    run_backward(PROBLEM)
    assert set(used) == set(found)

    monkeypatch.setattr(launch_config, "load_table", lambda gpu: {})

    def outputs(pads: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        monkeypatch.setattr(launch_config, "pads_experts", lambda *_: pads)
        return {p.name: p.launch(Config(16, 16, 16)) for p in tune.products(PROBLEM, CPU)}

    padded, plain = outputs(True), outputs(False)
    for name in ("grad_down", "grad_up"):  # the others are by row
        assert_close(padded[name], plain[name], TOLERANCES[torch.float32])
    for name, rows in padded.items():
        assert rows.isfinite().all(), name
        assert name.startswith("grad_") or rows.shape[0] > plain[name].shape[0], name
