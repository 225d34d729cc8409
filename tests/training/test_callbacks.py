"""ExpertUsageCallback: counts what each expert got, once, and leaves no hook behind."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import DOMAINS, features_of, make_dense, make_moe, make_pairs
from transformers import TrainerState

from moe_fast.layers import MoERouter
from moe_fast.losses import InfoNCELoss
from moe_fast.training import ExpertUsageCallback
from moe_fast.training.callbacks import _layer_names

PAIRS = make_pairs(6)
COLUMNS = [list(PAIRS["anchor"]), list(PAIRS["positive"])]


@pytest.fixture
def state():
    return TrainerState(global_step=3, epoch=0.5)


def begin(callback: ExpertUsageCallback, model) -> None:
    callback.on_train_begin(None, TrainerState(), None, model=model)


def hooks_on(model) -> int:
    return sum(len(m._forward_hooks) for m in model.modules() if isinstance(m, MoERouter))


def step(model, domains: list[str] | None = None) -> int:
    """One forward and backward; returns the number of real tokens."""
    features = features_of(model, *COLUMNS)
    if domains is not None:
        ids = torch.tensor([DOMAINS.index(name) for name in domains])
        for column in features:
            column |= {"domain_ids": ids, "expert_ids": ids}
    InfoNCELoss(model)(features).backward()
    return sum(int(column["attention_mask"].sum()) for column in features)


def test_enforced_routing_is_counted_exactly(state):
    model = make_moe(routing="enforced").train()
    callback = ExpertUsageCallback()
    begin(callback, model)
    step(model, ["fruit", "fruit", "fruit", "fruit", "river", "river"])
    features = features_of(model, *COLUMNS)
    lengths = sum(column["attention_mask"].sum(1) for column in features)
    expected = [int(lengths[:4].sum()), 0, int(lengths[4:].sum())]
    logs = callback.pop_logs(state)
    assert callback.history == [
        {"step": 3, "epoch": 0.5, "tokens": {"layer_0": expected, "layer_1": expected}}
    ]
    for layer in range(2):
        for expert, count in enumerate(expected):
            share = logs[f"expert_share/layer_{layer}/expert_{expert}"]
            assert share == pytest.approx(count / sum(expected), abs=1e-4)
    imbalance = max(expected) * 3 / sum(expected)
    assert logs["expert_load_imbalance"] == pytest.approx(imbalance, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
def test_every_real_token_is_counted_once(state, checkpointing, num_experts_per_tok):
    model = make_moe(num_experts_per_tok=num_experts_per_tok).train()
    if checkpointing:
        model.transformers_model.gradient_checkpointing_enable(
            {"use_reentrant": checkpointing == "reentrant"}
        )
    callback = ExpertUsageCallback()
    begin(callback, model)
    tokens = step(model)
    tokens += step(model)
    callback.pop_logs(state)
    for counts in callback.history[0]["tokens"].values():
        assert sum(counts) == tokens * num_experts_per_tok


def test_counting_stays_on_the_device_until_logged(state, monkeypatch):
    model = make_moe().train()
    callback = ExpertUsageCallback()
    begin(callback, model)

    def sync(tensor: torch.Tensor) -> None:
        raise AssertionError("a step must not read a value")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist"):
            patch.setattr(torch.Tensor, name, sync)
        for router in (m for m in model.modules() if isinstance(m, MoERouter)):
            hook = next(iter(router._forward_hooks.values()))
            hook(router, (), SimpleNamespace(tokens_per_expert=torch.tensor([1, 2, 3])))
            hook(router, (), SimpleNamespace(tokens_per_expert=torch.tensor([1, 0, 0])))
    callback.pop_logs(state)
    assert callback.history[0]["tokens"] == {"layer_0": [2, 2, 3], "layer_1": [2, 2, 3]}


def test_evaluation_is_not_counted(state):
    model = make_moe().eval()
    callback = ExpertUsageCallback()
    begin(callback, model)
    model.encode(COLUMNS[0])
    assert callback.pop_logs(state) == {}
    assert callback.history == []


def test_intervals_and_total(state):
    model = make_moe(routing="enforced").train()
    callback = ExpertUsageCallback(log_shares=False)
    begin(callback, model)
    step(model, ["fruit"] * 6)
    assert callback.pop_logs(state) == {"expert_load_imbalance": 3.0}
    step(model, ["metal"] * 6)
    callback.on_train_end(None, state, None)  # the unlogged rest is kept
    tokens = [entry["tokens"]["layer_0"] for entry in callback.history]
    assert [bool(count) for count in tokens[0]] == [True, False, False]
    assert [bool(count) for count in tokens[1]] == [False, True, False]
    total = callback.total_tokens()
    assert total["layer_0"] == [a + b for a, b in zip(*tokens, strict=True)]


def test_hooks_come_off(state):
    model = make_moe()
    callback = ExpertUsageCallback()
    begin(callback, model)
    begin(callback, model)  # a run that broke off leaves none behind
    assert hooks_on(model) == 2
    callback.on_train_end(None, state, None)
    assert hooks_on(model) == 0


def test_another_trainers_logs_get_them_too(state):
    model = make_moe().train()
    callback = ExpertUsageCallback()
    begin(callback, model)
    step(model)
    state.log_history = [{"loss": 1.0, "step": 3}]
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs={"eval_loss": 1.0})
    assert set(state.log_history[-1]) == {"loss", "step"}
    callback.on_log(None, state, None, logs=logs)
    assert logs["expert_load_imbalance"] >= 1.0
    assert state.log_history[-1]["expert_load_imbalance"] == logs["expert_load_imbalance"]


def test_a_dense_model_is_said_once(state):
    model, callback = make_dense(), ExpertUsageCallback()
    with pytest.warns(UserWarning, match="ExpertUsageCallback: the model is dense"):
        begin(callback, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(callback, model)
    step(model.train())
    logs = {"loss": 1.0}
    callback.on_log(None, state, None, logs=logs)
    callback.on_train_end(None, state, None)
    assert (logs, callback.history) == ({"loss": 1.0}, [])


def test_layers_are_named_by_their_number():
    encoder = "0.model.encoder.layer.{}.mlp.router"
    assert _layer_names([encoder.format(i) for i in (1, 11)]) == ["layer_1", "layer_11"]
    assert _layer_names(["layers.3.mlp.router"]) == ["layer_3"]
    ambiguous = ["query.layer.0.router", "document.layer.0.router"]
    assert _layer_names(ambiguous) == ambiguous
    assert _layer_names(["router"]) == ["router"]
    assert _layer_names([]) == []
