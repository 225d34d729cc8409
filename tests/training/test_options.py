"""Training's options with our trainer, collator and sampler: each does what it says."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from distributed_runs import RowLoss
from sentence_transformers import SentenceTransformerTrainingArguments
from tiny_models import (
    DOMAINS,
    make_dense,
    make_flag_rows,
    make_moe,
    make_pairs,
)
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from moe_fast.conversion import set_trainable
from moe_fast.losses import (
    ContrastiveLearningPenaltyLoss,
    DistillationLoss,
    InfoNCELoss,
    RouterLoss,
)
from moe_fast.training import (
    DomainBatchSampler,
    DomainDataCollator,
    ExpertUsageCallback,
    MoESentenceTransformerTrainer,
)
from moe_fast.training.row_sampling import draw_passages, flag_row_columns, is_swapped


def make_trainer(folder: Path, model, loss, dataset, *, args=None, **kwargs):
    settings = {
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 6,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "batch_sampler": DomainBatchSampler,
        **(args or {}),
    }
    arguments = SentenceTransformerTrainingArguments(str(folder), **settings)
    return MoESentenceTransformerTrainer(model, arguments, dataset, loss=loss, **kwargs)


class SpyLoss(nn.Module):
    """Keeps the texts of each batch, those of training apart from evaluation's."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        self.seen: dict[str, list] = {"train": [], "eval": []}

    def forward(self, features, labels=None):
        decode = functools.partial(self.model.tokenizer.batch_decode, skip_special_tokens=True)
        texts = zip(*(decode(column["input_ids"]) for column in features), strict=True)
        self.seen["train" if self.model.training else "eval"] += texts
        keys = ("input_ids", "attention_mask")
        clean = [{k: c[k] for k in keys} for c in features]
        return sum(self.model(c)["sentence_embedding"].square().mean() for c in clean)


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- draws and swaps -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_swaps_are_those_of_seed_epoch_and_row(tmp_path, workers):
    """Both columns, in every epoch, with workers that outlive it; evaluation never."""
    model = make_dense()
    spy = SpyLoss(model)
    pairs = make_pairs(24)
    args = {
        "max_steps": -1,
        "num_train_epochs": 3,
        "seed": 11,
        "eval_strategy": "epoch",
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
    }
    make_trainer(
        tmp_path, model, spy, pairs, args=args, eval_dataset=pairs, swap_pairs=True
    ).train()
    rows = list(zip(pairs["anchor"], pairs["positive"], strict=True))
    swapped = 0
    for epoch in range(3):
        expected = [(b, a) if is_swapped(a, b, 11, epoch) else (a, b) for a, b in rows]
        assert sorted(spy.seen["train"][24 * epoch : 24 * (epoch + 1)]) == sorted(expected)
        assert sorted(spy.seen["eval"][24 * epoch : 24 * (epoch + 1)]) == sorted(rows)
        swapped += sum(a != b for a, b in zip(expected, rows, strict=True))
    assert 20 < swapped < 52


def test_flag_rows_are_drawn_anew_in_each_epoch_but_not_in_evaluation(tmp_path):
    model = make_dense()
    spy = SpyLoss(model)
    rows = make_flag_rows(12, neg_q=True)
    args = {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "seed": 3}
    make_trainer(tmp_path, model, spy, rows, args=args, eval_dataset=rows, num_negatives=2).train()
    columns = flag_row_columns(2, negative_queries=True)
    for epoch in range(2):
        for kind, of in (("train", epoch), ("eval", None)):
            drawn = [draw_passages(row, 2, 3, of) for row in rows]
            expected = [tuple(row[column] for column in columns) for row in drawn]
            assert sorted(spy.seen[kind][12 * epoch : 12 * (epoch + 1)]) == sorted(expected)
    assert sorted(spy.seen["train"][:12]) != sorted(spy.seen["train"][12:])


def test_a_streamed_dataset_counts_its_epochs(tmp_path):
    """Its length is unknown, and the trainer's own state stays in epoch 0."""
    model = make_dense()
    spy = SpyLoss(model)
    pairs = make_pairs(12).remove_columns("domain")
    stream = pairs.to_iterable_dataset()
    args = {"max_steps": 6, "batch_sampler": "batch_sampler", "seed": 11}
    make_trainer(tmp_path, model, spy, stream, args=args, swap_pairs=True).train()
    rows = list(zip(pairs["anchor"], pairs["positive"], strict=True))
    for epoch in range(3):
        expected = [(b, a) if is_swapped(a, b, 11, epoch) else (a, b) for a, b in rows]
        assert spy.seen["train"][12 * epoch : 12 * (epoch + 1)] == expected


def test_losses_get_the_columns_they_want(tmp_path):
    """Negatives' own queries for the penalty, a teacher's scores for distillation."""
    model = make_moe(routing="enforced")
    penalty = ContrastiveLearningPenaltyLoss(model, queries_per_negative=1)
    rows = make_flag_rows(12, neg_q=True)
    trainer = make_trainer(tmp_path, model, penalty, rows, num_negatives=3)
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "penalty"))
    teacher = DistillationLoss(InfoNCELoss(model))
    rows = make_flag_rows(12, scores=True)
    trainer = make_trainer(tmp_path, model, teacher, rows, num_negatives=3)
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "distillation"))


# --- lengths and prompts -------------------------------------------------------------------------


def test_lengths_and_prompts_reach_the_collator(tmp_path):
    model = make_dense()
    rows = make_flag_rows(12)
    trainer = make_trainer(
        tmp_path,
        model,
        SpyLoss(model),
        rows,
        args={"prompts": {"query": "iron "}},
        num_negatives=2,
        max_length={"query": 4, "negative": 5},
    )
    with pytest.warns(UserWarning, match="limit of 4 tokens"):
        batch = trainer.data_collator(list(rows))
    widths = [batch[f"{c}_input_ids"].shape[1] for c in flag_row_columns(2, False)]
    assert widths == [4, 7, 5, 5]
    assert "iron" in model.tokenizer.decode(batch["query_input_ids"][0])


# --- several steps, number formats, logs ---------------------------------------------------------


@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulated_batches_equal_a_whole_one(tmp_path, accumulation):
    """For a loss that is a mean over rows; clipped, and with the loss's own parameter."""
    states = []
    for parts in (1, accumulation):
        model = make_moe(routing="enforced")
        loss = RowLoss(model)
        args = {
            "per_device_train_batch_size": 6 // parts,
            "gradient_accumulation_steps": parts,
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_grad_norm": 0.05,
        }
        make_trainer(tmp_path, model, loss, make_pairs(24), args=args).train()
        states.append(loss.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert states[0]["log_temperature"] != -1.0


def test_bf16_on_the_cpu(tmp_path):
    """Autocast: the weights and the optimizer stay float32, the loss near float32's; it learns."""
    losses = {}
    for bf16 in (False, True):
        model = make_moe(routing="token_topk", num_experts_per_tok=2)
        loss = RouterLoss(InfoNCELoss(model, learn_temperature=True), load_balance=0.05)
        args = {"bf16": bf16, "max_steps": 16, "learning_rate": 5e-3}
        trainer = make_trainer(tmp_path, model, loss, make_pairs(24), args=args)
        dtypes = set()
        model[0].model.encoder.layer[0].register_forward_hook(
            lambda m, i, o, seen=dtypes: seen.add((o[0] if isinstance(o, tuple) else o).dtype)
        )
        model[0].model.encoder.layer[0].attention.self.query.register_forward_hook(
            lambda m, i, o, seen=dtypes: seen.add(o.dtype)
        )
        trainer.train()
        assert (torch.bfloat16 in dtypes) == bf16
        assert {p.dtype for p in loss.parameters()} == {torch.float32}
        states = trainer.optimizer.state_dict()["state"].values()
        assert {state["exp_avg"].dtype for state in states} == {torch.float32}
        losses[bf16] = logged(trainer, "loss")
    assert losses[True] != losses[False]
    assert losses[True][0] == pytest.approx(losses[False][0], rel=0.05)
    assert losses[True][-1] < 0.7 * losses[True][0]


def test_tensorboard_gets_our_numbers(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = make_moe()
    loss = RouterLoss(InfoNCELoss(model, learn_temperature=True), load_balance=0.05)
    trainer = make_trainer(
        tmp_path,
        model,
        loss,
        make_pairs(24),
        args={"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 2},
        eval_dataset=make_pairs(6, seed=1),
        callbacks=[ExpertUsageCallback()],
    )
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    scalars = set(events.Tags()["scalars"])
    names = ["loss", "in_batch_accuracy", "temperature", "load_balance", "expert_load_imbalance"]
    assert {f"train/{name}" for name in names} <= scalars
    assert {"eval/loss", "eval/in_batch_accuracy", "eval/temperature"} <= scalars
    for name in names:
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx(logged(trainer, name))


# --- stopping early, and the best model ----------------------------------------------------------


class Falling(TrainerCallback):
    """Evaluations whose loss gets worse after the second."""

    def __init__(self) -> None:
        self.values = iter([0.5, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = next(self.values)


STOPPING = {
    "max_steps": 8,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "learning_rate_mapping": {"log_temperature": 1e-1},
}


def stopping_trainer(folder: Path, *callbacks, **args):
    model = make_moe()
    loss = InfoNCELoss(model, learn_temperature=True)
    return make_trainer(
        folder,
        model,
        loss,
        make_pairs(24),
        args=STOPPING | args,
        eval_dataset=make_pairs(6, seed=1),
        callbacks=[*callbacks, EarlyStoppingCallback(2)],
    )


def test_early_stopping_ends_with_the_best_model_and_its_loss(tmp_path):
    temperatures, weights = [], []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            temperatures.append(trainer.loss.log_temperature.item())
            weights.append({k: v.clone() for k, v in model.state_dict().items()})

    trainer = stopping_trainer(tmp_path, Falling(), Record())
    trainer.train()
    assert trainer.state.global_step == 4  # two steps after the best
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.loss.log_temperature.item() == temperatures[1] != temperatures[3]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[1][name])


def test_patience_survives_an_interruption(tmp_path):
    """With restore_callback_states_from_checkpoint, as transformers has it."""

    class Interrupt(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    falling = Falling()
    with pytest.raises(KeyboardInterrupt):
        stopping_trainer(tmp_path, falling, Interrupt()).train()
    trainer = stopping_trainer(tmp_path, falling, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


# --- frozen parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["experts", "experts+router", "all"])
def test_frozen_parameters_do_not_change_and_have_no_optimizer_state(tmp_path, what):
    model = make_moe()
    set_trainable(model[0].model, what, freeze_embeddings=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = {"weight_decay": 0.1, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, model, InfoNCELoss(model), make_pairs(24), args=args)
    trainer.train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    unused = {name for name in before if "pooler" in name}  # of mean pooling
    assert changed - unused == trainable - unused
    assert not any("embeddings" in name for name in changed)
    assert len(trainer.optimizer.state_dict()["state"]) == len(trainable - unused)
    resumed = make_trainer(tmp_path, model, InfoNCELoss(model), make_pairs(24), args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


# --- bad input -----------------------------------------------------------------------------------


def test_one_domain_only_is_said_at_the_start(tmp_path):
    pairs = make_pairs(18).filter(lambda row: row["domain"] == "fruit")
    model = make_moe()
    with pytest.warns(UserWarning, match="one domain only, 'fruit', and the model has 3"):
        make_trainer(tmp_path, model, InfoNCELoss(model), pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainer(tmp_path, make_dense(), InfoNCELoss(make_dense()), pairs)


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        (make_pairs(6), {"num_negatives": 2}, r"num_negatives is for rows of query, pos and neg"),
        (make_pairs(6), {"max_length": {"ankor": 5}}, r"max_length names \['ankor'\]"),
        (make_pairs(6), {"max_length": 99}, r"max_length=99 goes beyond the model's"),
        (make_pairs(6, negatives=1), {"swap_pairs": True}, r"swap_pairs needs rows of two texts"),
        (
            make_pairs(6),
            {"swap_pairs": True, "max_length": {"anchor": 5, "positive": 9}},
            r"treated alike, but 'anchor' has 5",
        ),
        (make_flag_rows(6), {"num_negatives": -1}, r"num_negatives must be at least 0; got -1"),
        (
            make_flag_rows(6).map(lambda row: {"pos": []}),
            {},
            r"row 0 of the train dataset: 'pos' is empty",
        ),
    ],
)
def test_settings_that_do_not_fit_the_data(tmp_path, dataset, settings, message):
    model = make_dense()
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model, InfoNCELoss(model), dataset, **settings)


def test_a_prompt_for_a_column_that_is_not_there(tmp_path):
    model = make_dense()
    args = {"prompts": {"querry": "query: "}}
    with pytest.raises(ValueError, match=r"prompts names \['querry'\], but the text columns are"):
        make_trainer(tmp_path, model, InfoNCELoss(model), make_pairs(6), args=args)
    # By dataset, as sentence-transformers has it.
    args = {"prompts": {"one": "iron "}}
    data = DatasetDict(one=make_pairs(6), two=make_pairs(6))
    make_trainer(tmp_path, model, InfoNCELoss(model), data, args=args)


def test_settings_beside_a_collator_of_ones_own(tmp_path):
    model = make_moe()
    collator = DomainDataCollator.from_model(model, swap_pairs=True)
    trainer = make_trainer(
        tmp_path, model, InfoNCELoss(model), make_pairs(6), data_collator=collator
    )
    assert trainer.data_collator is collator
    assert collator.domains == DOMAINS
    with pytest.raises(ValueError, match=r"\['swap_pairs', 'max_length'\] are settings of the def"):
        make_trainer(
            tmp_path,
            model,
            InfoNCELoss(model),
            make_pairs(6),
            data_collator=collator,
            swap_pairs=True,
            max_length=5,
        )


def test_the_states_json_is_readable(tmp_path):
    """What a plot of the run is made of."""
    model = make_moe()
    args = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, model, InfoNCELoss(model), make_pairs(24), args=args).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert [e["step"] for e in state["log_history"] if "in_batch_accuracy" in e] == [1, 2, 3, 4]
