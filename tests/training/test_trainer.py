"""MoESentenceTransformerTrainer: tiny runs from end to end, and what API.md warns of."""

from __future__ import annotations

import functools
import json
import runpy
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import DatasetDict
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_models import DOMAINS, make_dense, make_moe, make_pairs
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

import moe_fast.training
from moe_fast.losses import InfoNCELoss
from moe_fast.training import (
    DomainBatchSampler,
    DomainDataCollator,
    ExpertUsageCallback,
    MoESentenceTransformerTrainer,
)
from moe_fast.training.loss_state import LOSS_STATE_NAME
from moe_fast.training.trainer import _SetEpoch


def make_args(folder: Path, **kwargs) -> SentenceTransformerTrainingArguments:
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
    }
    return SentenceTransformerTrainingArguments(str(folder), **(settings | kwargs))


def make_trainer(folder: Path, model, *, loss=None, dataset=None, args=None, **kwargs):
    return MoESentenceTransformerTrainer(
        model,
        make_args(folder, **(args or {})),
        make_pairs() if dataset is None else dataset,
        loss=loss or InfoNCELoss(model),
        **kwargs,
    )


class SpyLoss(nn.Module):
    """Records the features of each batch; a loss that pulls all embeddings to zero."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        self.batches: list[list[dict[str, Tensor]]] = []

    def forward(self, features, labels):
        self.batches.append([dict(column) for column in features])
        clean = [{k: c[k] for k in ("input_ids", "attention_mask")} for c in features]
        return sum(self.model(c)["sentence_embedding"].square().mean() for c in clean)


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def equal_states(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


# --- the package ---------------------------------------------------------------------------------


def test_a_missing_extra_is_named(monkeypatch):
    find = "importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None if name == "datasets" else object())
    with pytest.raises(ImportError, match=r"needs datasets, .*pip install -e '.\[train\]'"):
        runpy.run_path(moe_fast.training.__file__)


# --- the default collator ------------------------------------------------------------------------


def test_the_default_collator_takes_the_models_domains(tmp_path):
    collator = make_trainer(tmp_path, make_moe(routing="enforced")).data_collator
    assert isinstance(collator, DomainDataCollator)
    assert (collator.domains, collator.emit_expert_ids) == (DOMAINS, True)
    reversed_names = DOMAINS[::-1]
    collator = make_trainer(tmp_path, make_moe(domains=reversed_names)).data_collator
    assert (collator.domains, collator.emit_expert_ids) == (reversed_names, False)


def test_a_dense_models_domains_are_the_datasets(tmp_path):
    dataset = make_pairs().rename_column("domain", "source")
    args = {"batch_sampler": "batch_sampler"}
    trainer = make_trainer(
        tmp_path, make_dense(), dataset=dataset, domain_column="source", args=args
    )
    assert isinstance(trainer.data_collator, DomainDataCollator)
    assert trainer.data_collator.domains == sorted(DOMAINS)
    trainer.train()


def test_without_a_domain_column_no_ids(tmp_path):
    dataset = make_pairs().remove_columns("domain")
    model = make_dense()
    spy = SpyLoss(model)
    args = {"batch_sampler": "batch_sampler", "max_steps": 1}
    make_trainer(tmp_path, model, loss=spy, dataset=dataset, args=args).train()
    assert [set(column) & {"domain_ids", "expert_ids"} for column in spy.batches[0]] == [set()] * 2


def test_the_arguments_prompts_reach_the_collator(tmp_path):
    prompts = {"anchor": "apple "}
    assert make_trainer(tmp_path, make_moe(), args={"prompts": prompts}).data_collator.prompts == (
        prompts
    )


def test_a_domain_column_in_some_datasets_only_is_an_error(tmp_path):
    evaluation = make_pairs().remove_columns("domain")
    with pytest.raises(ValueError, match=r"column 'domain' .* missing from \['eval'\]"):
        make_trainer(tmp_path, make_moe(), eval_dataset=evaluation)


def test_ids_for_a_model_without_domains_are_an_error(tmp_path):
    dataset = make_pairs(6).remove_columns("domain").add_column("domain", [0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match=r"knows no domains and column 'domain' holds \['0', "):
        make_trainer(tmp_path, make_dense(), dataset=dataset)
    make_trainer(tmp_path, make_moe(routing="enforced"), dataset=dataset).train()


# --- what reaches the loss -----------------------------------------------------------------------


@pytest.mark.parametrize("num_negatives", [0, 2])
@pytest.mark.parametrize("make_model", [make_dense, make_moe])
def test_the_domain_is_never_a_text_and_ids_stay_with_their_rows(
    tmp_path, make_model, num_negatives
):
    model = make_model()
    dataset = make_pairs(negatives=num_negatives)
    spy = SpyLoss(model)
    make_trainer(tmp_path, model, loss=spy, dataset=dataset, args={"max_steps": 8}).train()
    domain_of = dict(zip(dataset["anchor"], dataset["domain"], strict=True))
    seen = []
    for columns in spy.batches:
        assert len(columns) == 2 + num_negatives
        for column in columns:
            assert torch.equal(column["domain_ids"], columns[0]["domain_ids"])
        texts = model.tokenizer.batch_decode(columns[0]["input_ids"], skip_special_tokens=True)
        names = [DOMAINS[i] for i in columns[0]["domain_ids"]]
        assert names == [domain_of[text] for text in texts]
        seen += texts
    assert sorted(seen) == sorted(2 * list(dataset["anchor"]))  # two epochs, each row once in each


@pytest.mark.parametrize("make_eval", [lambda: None, lambda: DatasetDict(x=make_pairs())])
def test_the_model_card_takes_no_domain_for_a_text(tmp_path, make_eval):
    trainer = make_trainer(tmp_path, make_moe(), eval_dataset=make_eval())
    card = trainer.model.model_card_data
    texts = [f"<code>{name}</code>" for name in make_pairs().column_names if name != "domain"]
    assert [data["columns"] for data in card.train_datasets] == [texts]
    assert not set(DOMAINS) & {text for example in card.widget for text in example["sentences"]}
    assert "domain" in trainer.train_dataset.column_names


@pytest.mark.parametrize("drop_last", [False, True])
def test_single_domain_batches_really_are(tmp_path, drop_last):
    model = make_dense()
    spy = SpyLoss(model)
    args = {
        "batch_sampler": functools.partial(DomainBatchSampler, mode="single"),
        "num_train_epochs": 2,
        "max_steps": -1,
        "per_device_train_batch_size": 5,
        "dataloader_drop_last": drop_last,
    }
    trainer = make_trainer(tmp_path, model, loss=spy, args=args)
    trainer.train()
    assert all(len(set(c["domain_ids"].tolist())) == 1 for batch in spy.batches for c in batch)
    sizes = sorted(len(batch[0]["domain_ids"]) for batch in spy.batches)
    assert sizes == [5] * 6 if drop_last else sizes == [3] * 6 + [5] * 6  # 8 rows of each domain


@pytest.mark.parametrize("make_loss", [InfoNCELoss, MultipleNegativesRankingLoss])
@pytest.mark.parametrize("routing", [None, "enforced", "token_topk"])
def test_losses_and_models_combine(tmp_path, make_loss, routing):
    """sentence-transformers' own loss hands all features on; each kind of encoder bears them."""
    model = make_moe(routing=routing) if routing else make_dense()
    dataset = make_pairs(12, negatives=1)
    trainer = make_trainer(
        tmp_path, model, loss=make_loss(model), dataset=dataset, args={"max_steps": 1}
    )
    trainer.train()
    assert logged(trainer, "loss")[0] > 0


# --- training and its logs -----------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["enforced", "token_topk"])
def test_a_few_steps_lower_the_loss(tmp_path, routing):
    model = make_moe(routing=routing)
    usage = ExpertUsageCallback()
    loss = InfoNCELoss(model, learn_temperature=True, negatives_from="same_domain")
    args = {"max_steps": 24, "learning_rate": 5e-3, "logging_steps": 4}
    trainer = make_trainer(tmp_path, model, loss=loss, args=args, callbacks=[usage])
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < 0.5 * losses[0]
    accuracy = logged(trainer, "in_batch_accuracy")
    assert len(accuracy) == len(losses) == 6
    assert accuracy[-1] >= accuracy[0]
    assert logged(trainer, "temperature")[-1] == pytest.approx(loss.temperature, rel=0.1)
    imbalance = logged(trainer, "expert_load_imbalance")
    assert all(1.0 <= value <= 3.0 for value in imbalance)
    for entry in trainer.state.log_history[:6]:
        shares = [entry[f"expert_share/layer_1/expert_{e}"] for e in range(3)]
        assert sum(shares) == pytest.approx(1.0, abs=1e-3)
    assert [entry["step"] for entry in usage.history] == [4, 8, 12, 16, 20, 24]


def test_every_callback_sees_the_shares(tmp_path):
    """Reporters come before the user's callbacks: what is added in on_log they never see."""
    seen: list[dict] = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callbacks = [Reporter(), ExpertUsageCallback()]
    make_trainer(tmp_path, make_moe(), args={"max_steps": 1}, callbacks=callbacks).train()
    assert "expert_load_imbalance" in seen[0]
    assert "in_batch_accuracy" in seen[0]


def test_the_progress_bar_shows_the_loss(tmp_path, capfd):
    args = {"disable_tqdm": False, "max_steps": 2}
    make_trainer(tmp_path, make_moe(), args=args).train()
    out, err = capfd.readouterr()
    assert "2/2" in err
    assert "'loss'" in out + err
    assert "'in_batch_accuracy'" in out + err


def test_evaluation_has_its_own_metrics(tmp_path):
    model = make_moe(routing="enforced")
    trainer = make_trainer(
        tmp_path,
        model,
        loss=InfoNCELoss(model, learn_temperature=True),
        eval_dataset={"a": make_pairs(12, seed=1), "b": make_pairs(12, seed=2)},
        args={"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2},
    )
    trainer.train()
    metrics = trainer.evaluate()
    for name in ("a", "b"):
        assert 0 < metrics[f"eval_{name}_in_batch_accuracy"] <= 1
        assert len(logged(trainer, f"eval_{name}_in_batch_accuracy")) == 2
        assert metrics[f"eval_{name}_temperature"] == pytest.approx(0.05, rel=0.1)
    assert len(logged(trainer, "in_batch_accuracy")) == 2


def test_a_loss_per_dataset(tmp_path):
    model = make_moe()
    dataset = DatasetDict(a=make_pairs(12), b=make_pairs(12, seed=1))
    losses = {
        "a": InfoNCELoss(model, learn_temperature=True),
        "b": InfoNCELoss(model, learn_temperature=True, temperature=0.5),
    }
    args = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "logging_steps": 4}
    trainer = make_trainer(tmp_path, model, loss=losses, dataset=dataset, args=args)
    trainer.train()
    assert (tmp_path / "checkpoint-4" / LOSS_STATE_NAME).is_file()
    for name, temperature in (("a", 0.05), ("b", 0.5)):
        assert logged(trainer, f"{name}_in_batch_accuracy")
        assert logged(trainer, f"{name}_temperature") == [pytest.approx(temperature, rel=0.1)]
    assert trainer.get_decay_parameter_names(nn.ModuleDict(losses))


# --- the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True])
def test_the_temperature_is_optimized_without_weight_decay(tmp_path, mapped):
    model = make_moe()
    loss = InfoNCELoss(model, learn_temperature=True)
    args = {"weight_decay": 0.1}
    if mapped:
        args["learning_rate_mapping"] = {"log_temperature": 0.5}
    trainer = make_trainer(tmp_path, model, loss=loss, args=args)
    optimizer = trainer.create_optimizer()
    holding = [
        group
        for group in optimizer.param_groups
        if any(parameter is loss.log_temperature for parameter in group["params"])
    ]
    assert len(holding) == 1
    assert holding[0]["weight_decay"] == 0.0
    assert holding[0]["lr"] == (0.5 if mapped else 1e-3)
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} <= parameters
    before = loss.log_temperature.item()
    trainer.train()
    assert loss.log_temperature.item() != before


LEARNED = [
    ("token_topk", "auto", 1),
    ("token_topk", "auto", 2),
    ("token_topk", "probability", 1),
    ("token_topk", "probability", 2),
    ("token_topk", "renormalize", 2),
    ("token_topk", "straight_through", 1),
    ("sentence_topk", "auto", 1),
    ("sentence_topk", "auto", 2),
    ("sentence_topk", "probability", 2),
    ("sentence_switch", "auto", 1),
    ("sentence_switch", "probability", 1),
    ("dense", "auto", 3),
]
UNLEARNED = [
    ("token_topk", "one", 1),
    ("sentence_switch", "one", 1),
    ("token_topk", "renormalize", 1),
]


@pytest.mark.parametrize(("routing", "weight_mode", "k"), LEARNED + UNLEARNED)
def test_the_contrastive_loss_reaches_the_router(routing, weight_mode, k):
    """SPEC section 2: in every learned mode but "one", and "renormalize" at K = 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the router will not learn
        model = make_moe(routing=routing, weight_mode=weight_mode, num_experts_per_tok=k)
    dataset = make_pairs(6)
    features = DomainDataCollator.from_model(model)(list(dataset))
    columns = [
        {key[len(c) + 1 :]: value for key, value in features.items() if key.startswith(c)}
        for c in ("anchor", "positive")
    ]
    InfoNCELoss(model)(columns).backward()
    routers = {n: p for n, p in model.named_parameters() if n.endswith("router.weight")}
    assert len(routers) == 2
    for name, weight in routers.items():
        size = 0.0 if weight.grad is None else weight.grad.abs().max().item()
        if (routing, weight_mode, k) in UNLEARNED:
            assert size < 1e-6, name
        else:
            assert size > 1e-5, name


# --- the same run again, and resumed -------------------------------------------------------------

RESUMABLE = {
    "max_steps": 8,
    "per_device_train_batch_size": 5,  # 5 steps an epoch: step 3 and 7 lie within one
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate_mapping": {"log_temperature": 1e-2},
    "weight_decay": 0.01,
}


def run(folder: Path, *, resume: str | None = None, seed: int = 7, eval_dataset=None, **args):
    """A MoE with dropout and a learned temperature, trained for 8 steps of 2 epochs."""
    model = make_moe(dropout=0.2)
    loss = InfoNCELoss(model, learn_temperature=True)
    settings = RESUMABLE | {"seed": seed} | args
    trainer = make_trainer(folder, model, loss=loss, args=settings, eval_dataset=eval_dataset)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), folder


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole, tmp_path, step):
    expected, folder = whole
    resumed = run(tmp_path, resume=str(folder / f"checkpoint-{step}"))
    assert equal_states(resumed.loss.state_dict(), expected.loss.state_dict())
    assert resumed.loss.temperature != 0.05
    assert logged(resumed, "loss") == logged(expected, "loss")
    theirs, ours = (t.optimizer.state_dict() for t in (expected, resumed))
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert equal_states(ours["state"][index], state)


def test_a_resumed_run_with_persistent_workers_equals_an_uninterrupted_one(tmp_path):
    """Starting workers draws random numbers, which a resumed run does at other times."""
    args = {
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    evaluation = make_pairs(6, seed=1)
    expected = run(tmp_path / "whole", eval_dataset=evaluation, **args)
    for step in (3, 5):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = run(tmp_path / "run", resume=checkpoint, eval_dataset=evaluation, **args)
        assert equal_states(resumed.loss.state_dict(), expected.loss.state_dict())


@pytest.mark.parametrize("mode", ["mixed", "single"])
def test_two_runs_with_the_same_seed_are_identical(tmp_path, mode):
    args = {
        "save_strategy": "no",
        "batch_sampler": functools.partial(DomainBatchSampler, mode=mode),
    }
    first, second = (run(tmp_path, **args) for _ in range(2))
    assert equal_states(first.loss.state_dict(), second.loss.state_dict())
    assert logged(first, "loss") == logged(second, "loss")
    other = run(tmp_path, seed=8, **args)
    assert logged(first, "loss") != logged(other, "loss")


def test_the_checkpoint_holds_the_losss_state(whole):
    trainer, folder = whole
    assert (folder / "checkpoint-8" / LOSS_STATE_NAME).is_file()
    assert trainer._checkpoint_push_skip_names(str(folder / "checkpoint-8")) >= {LOSS_STATE_NAME}


def test_resuming_without_the_losss_state_is_an_error(whole, tmp_path):
    folder = whole[1]
    broken = shutil.copytree(folder / "checkpoint-3", tmp_path / "checkpoint-3")
    (broken / LOSS_STATE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"loss_state.safetensors.*log_temperature"):
        run(tmp_path, resume=str(broken))


@pytest.mark.parametrize("lost", [False, True])
def test_the_best_model_comes_with_its_temperature(tmp_path, lost):
    """The evaluation is best at step 1: training goes away from there with a huge rate."""

    class Lose(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if lost:
                (Path(args.output_dir) / "checkpoint-1" / LOSS_STATE_NAME).unlink(missing_ok=True)

    model = make_moe()
    loss = InfoNCELoss(model, learn_temperature=True)
    temperatures = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            temperatures.append(loss.log_temperature.item())

    args = {
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_in_batch_accuracy",
        "learning_rate_mapping": {"log_temperature": 0.1},
        "lr_scheduler_type": "constant",
    }
    trainer = make_trainer(
        tmp_path,
        model,
        loss=loss,
        args=args,
        eval_dataset=make_pairs(6, seed=1),
        callbacks=[Lose(), Record()],
    )
    trainer.evaluation_loop = falling(trainer.evaluation_loop)
    if lost:
        with pytest.raises(FileNotFoundError, match=LOSS_STATE_NAME):
            trainer.train()
        return
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert temperatures[0] != temperatures[1]
    assert loss.log_temperature.item() == temperatures[0]


def falling(evaluation_loop):
    """An evaluation whose accuracy gets worse each time."""
    values = iter([0.9, 0.1])

    def loop(*args, **kwargs):
        output = evaluation_loop(*args, **kwargs)
        output.metrics["eval_in_batch_accuracy"] = next(values)
        return output

    return loop


def test_a_saved_model_is_complete_and_loads(tmp_path):
    model = make_moe(routing="enforced")
    trainer = make_trainer(tmp_path, model, args={"max_steps": 1})
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = moe_fast.MoESentenceTransformer(str(tmp_path / "final"), device="cpu")
    texts = ["apple pear", "iron"]
    expected = model.encode(texts, domain=["fruit", "metal"])
    assert (loaded.encode(texts, domain=["fruit", "metal"]) == expected).all()
    modules = json.loads((tmp_path / "final" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)


# --- epochs --------------------------------------------------------------------------------------


def test_the_epoch_reaches_the_sampler_through_every_wrapper():
    sampler = DomainBatchSampler(make_pairs(), batch_size=4, drop_last=False)
    shard = BatchSamplerShard(sampler, 2, 0, even_batches=False)
    collator = DomainDataCollator.from_model(make_dense(), domain_column=None)

    class Loader:
        batch_sampler = SkipBatchSampler(shard, 1)

    state = TrainerState(epoch=3.25)
    trainer = SimpleNamespace(
        data_collator=collator,
        _resumed_at=None,
        _begin_pass=lambda epoch, loader: None,
        _take_up_logs=lambda: None,
    )
    callback = _SetEpoch(trainer)
    callback.on_train_begin(None, state, None)
    for epoch in (3, 4):
        callback.on_epoch_begin(None, state, None, train_dataloader=Loader())
        assert sampler.epoch == int(collator._epoch) == epoch
