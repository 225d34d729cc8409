"""What the processes of ``test_distributed.py`` do; each leaves its findings in a file."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny_models import DOMAINS, make_moe, make_pairs
from torch import Tensor, distributed, nn

from moe_fast.conversion import set_trainable
from moe_fast.losses import (
    CachedLoss,
    ContrastiveLearningPenaltyLoss,
    InfoNCELoss,
    RouterLoss,
)
from moe_fast.training import (
    DomainBatchSampler,
    ExpertUsageCallback,
    MoESentenceTransformerTrainer,
)
from moe_fast.training.distributed import average_gradients, broadcast_from_first


def rank() -> int:
    return int(os.environ.get("RANK", "0"))  # the group is there only with the trainer's arguments


def make_args(folder: Path, **kwargs: Any) -> SentenceTransformerTrainingArguments:
    settings = {
        "num_train_epochs": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "batch_sampler": DomainBatchSampler,
    }
    return SentenceTransformerTrainingArguments(str(folder), **(settings | kwargs))


class RowLoss(nn.Module):
    """A mean over rows: any two halves of a batch, averaged, give the whole one's."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.log_temperature = nn.Parameter(torch.tensor(-1.0 - rank()))  # process 0's is to hold
        self.unused = nn.Parameter(torch.ones(3))
        self.last_metrics: dict[str, Tensor] = {}

    def forward(self, features: Any, labels: Any = None) -> Tensor:
        keys = ("input_ids", "attention_mask", "expert_ids")
        a, b = (self.model({k: f[k] for k in keys})["sentence_embedding"] for f in features)
        similarity = torch.cosine_similarity(a, b)
        self.last_metrics = {"similarity": similarity.mean().detach()}
        return nn.functional.softplus(1 - similarity / self.log_temperature.exp()).mean()


def decomposing_run(
    folder: Path, batch_size: int, accumulation: int, streamed: bool = False
) -> None:
    """Trains with :class:`RowLoss`; its weights and logs."""
    model = make_moe(routing="enforced")
    loss = RowLoss(model)
    args = make_args(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.05,
    )
    dataset = make_pairs(24)
    if streamed:
        args.max_steps = 12  # two epochs, as of the other
        dataset = dataset.to_iterable_dataset()
    trainer = MoESentenceTransformerTrainer(model, args, dataset, loss=loss)
    trainer.train()
    state = {k.replace("model.module.", "model."): v for k, v in loss.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{rank()}.safetensors")
    (folder / f"{rank()}.json").write_text(json.dumps(trainer.state.log_history))


def cached_run(folder: Path, batch_size: int, accumulation: int) -> None:
    """Trains in chunks on a mean over rows and on router losses; its weights."""
    model = make_moe(routing="token_topk", num_experts_per_tok=2)
    rows = ContrastiveLearningPenaltyLoss(model, penalty_weight=1.0, mask_duplicates=False)
    router = {"load_balance": 0.5, "mutual_information": 0.5, "joint_decay": 0.8}
    loss = CachedLoss(RouterLoss(rows, **router), tokens_per_chunk=20)
    args = make_args(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
    )
    MoESentenceTransformerTrainer(model, args, make_pairs(32), loss=loss).train()
    state = {k: v for k, v in loss.state_dict().items() if "joint" in k} | model.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, folder / f"{rank()}.safetensors")


def single_domain_run(folder: Path) -> None:
    """Experts alone are trained, each process on a batch of one domain, saved every two steps."""
    model = make_moe(routing="enforced")
    set_trainable(model[0].model, "experts")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saves = []
    model.save_pretrained = lambda *args, **kwargs: saves.append(args)  # type: ignore
    usage = ExpertUsageCallback()
    args = make_args(
        folder,
        per_device_train_batch_size=4,
        save_strategy="steps",
        save_steps=2,
        batch_sampler=functools.partial(DomainBatchSampler, mode="single"),
    )
    loss = InfoNCELoss(model, learn_temperature=True)
    trainer = MoESentenceTransformerTrainer(
        model, args, make_pairs(24), loss=loss, callbacks=[usage]
    )
    trainer.train()
    findings = {
        "saves": len(saves),
        "history": usage.history,
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "changed": [n for n, p in model.named_parameters() if not torch.equal(p, before[n])],
        "optimizer states": len(trainer.optimizer.state_dict()["state"]),
        "sum": sum(p.double().sum().item() for p in loss.parameters()),
        "domains": len(DOMAINS),
    }
    (folder / f"{rank()}.json").write_text(json.dumps(findings))


class Around(nn.Module):
    """A loss around a loss, which holds no model itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Any, labels: Any = None) -> Tensor:
        return 2 * self.inner(features, labels)


class Hidden(nn.Module):
    """A loss whose encoder nothing can replace: its gradients would stay each process's own."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Any, labels: Any = None) -> Tensor:
        keys = ("input_ids", "attention_mask")
        texts = [self.encoder({k: f[k] for k in keys})["sentence_embedding"] for f in features]
        return (texts[0] - texts[1]).square().mean()


def wrapped_run(folder: Path) -> None:
    """Losses that are not the encoder's direct owner."""
    findings = {}
    # Made first: within a group of processes, transformers lets only the first one save, as
    # make_moe does.
    around, hidden = make_moe(), make_moe()
    for name, model, loss in (
        ("Around", around, Around(MultipleNegativesRankingLoss(around))),
        ("Hidden", hidden, Hidden(hidden)),
    ):
        args = make_args(folder, per_device_train_batch_size=4, max_steps=2)
        trainer = MoESentenceTransformerTrainer(model, args, make_pairs(24), loss=loss)
        try:
            trainer.train()
            findings[name] = sum(p.double().sum().item() for p in model.parameters())
        except ValueError as error:
            findings[name] = str(error)
    (folder / f"{rank()}.json").write_text(json.dumps(findings))


def exchange(folder: Path) -> None:
    """The two exchanges alone."""
    distributed.init_process_group("gloo")
    own = rank()
    half, both, nobody, frozen = (
        nn.Parameter(torch.full((2,), 9.0, dtype=t)) for t in [torch.float64] + [torch.float32] * 3
    )
    frozen.requires_grad_(False)
    if own == 0:
        half.grad = torch.tensor([1.0, 2.0**-50], dtype=torch.float64)
    both.grad = torch.tensor([1.0 + own, -3.0 * own])
    average_gradients([half, both, nobody, frozen])
    values = [torch.tensor(float(own + 5)), torch.arange(6.0).view(2, 3).t() + own]
    broadcast_from_first(values)
    findings = {
        "half": half.grad.tolist(),
        "both": both.grad.tolist(),
        "none": [nobody.grad, frozen.grad],
        "values": [value.tolist() for value in values],
    }
    (folder / f"{own}.json").write_text(json.dumps(findings))
