"""Training with CachedLoss: the plain run's weights, its logs, exact resumption, two processes."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from datasets import Dataset
from distributed_runs import cached_run
from processes import Run
from safetensors.torch import load_file
from test_resume import state_of
from test_trainer import make_trainer
from tiny_models import DOMAINS, make_moe, sentence

from moe_fast.losses import CachedLoss, InfoNCELoss, RouterLoss
from moe_fast.training import ExpertUsageCallback


def make_loss(model, **router) -> RouterLoss:
    return RouterLoss(InfoNCELoss(model, learn_temperature=True), load_balance=0.1, **router)


def make_learned(dropout: float = 0.0):
    return make_moe(dropout=dropout, routing="token_topk", num_experts_per_tok=2)


def unequal_pairs(rows: int) -> Dataset:
    """Texts of one to twelve words."""
    rng = random.Random(0)
    domains = [rng.choice(DOMAINS) for _ in range(rows)]
    texts = [[sentence(d, rng, rng.randint(1, 12)) for d in domains] for _ in range(2)]
    return Dataset.from_dict({"anchor": texts[0], "positive": texts[1], "domain": domains})


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_without_dropout_is_the_plain_run(tmp_path, accumulation):
    args = {"gradient_accumulation_steps": accumulation, "optim": "sgd", "learning_rate": 0.05}
    states, logs, usages = [], [], []
    for cached in (False, True):
        model = make_learned()
        loss = make_loss(model, mutual_information=0.1)
        if cached:
            loss = CachedLoss(loss, tokens_per_chunk=20)
        usage = ExpertUsageCallback()
        trainer = make_trainer(
            tmp_path, model, loss=loss, dataset=unequal_pairs(48), args=args, callbacks=[usage]
        )
        trainer.train()
        states.append(model.state_dict())
        logs.append(trainer.state.log_history)
        usages.append(usage.total_tokens())
    for name, value in states[0].items():
        # Four steps of sgd on gradients that agree to 1e-5.
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert usages[0] == usages[1]  # the second pass counts no token twice
    for plain, own in zip(*logs, strict=True):
        for key in set(plain) & {"loss", "in_batch_accuracy", "temperature", "load_balance"}:
            assert own[key] == pytest.approx(plain[key], rel=1e-3, abs=2e-4), key
    wanted = {"loss", "in_batch_accuracy", "temperature", "tokens_per_second", "padding_avoided"}
    assert wanted <= logs[1][0].keys()
    assert 0 <= logs[1][0]["padding_avoided"] <= 1


def test_a_resumed_run_continues_exactly(tmp_path):
    """With dropout, a learned temperature and a chunk size that the first batch chose."""
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    def run(folder, **kwargs):
        model = make_learned(dropout=0.2)
        loss = CachedLoss(make_loss(model, mutual_information=0.1, joint_decay=0.9))
        trainer = make_trainer(folder, model, loss=loss, args=args)
        trainer.train(**kwargs)
        return loss

    folder = tmp_path / "run"
    first = run(folder)
    expected = state_of(folder / "checkpoint-4")
    assert any("chosen_tokens_per_chunk" in name for name in expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = run(folder, resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert second.tokens_per_chunk == first.tokens_per_chunk
    found = state_of(folder / "checkpoint-4")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_evaluation_runs_in_chunks_too(tmp_path):
    model = make_learned()
    cached = CachedLoss(make_loss(model), tokens_per_chunk=20)
    trainer = make_trainer(tmp_path, model, loss=cached, eval_dataset=unequal_pairs(12))
    metrics = trainer.evaluate()
    plain = make_trainer(
        tmp_path, model, loss=cached.loss, eval_dataset=unequal_pairs(12)
    ).evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert "eval_padding_avoided" in metrics


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_are_one_with_the_whole_batch(tmp_path, accumulation):
    """A loss that is a mean over rows, and router losses of the global batch."""
    states = []
    for world_size, batch_size in ((1, 8), (2, 4)):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        args = (folder, batch_size, accumulation)
        Run(folder / "log", world_size, cached_run, *args).expect_success()
        states += [load_file(folder / f"{rank}.safetensors") for rank in range(world_size)]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        for name, value in states[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)
