"""The three models that the demo trains, and how: same pairs, same seed, same budget."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import ProgressCallback, TrainerCallback, set_seed

import moe_fast
from moe_fast.demo.docstrings import DOMAINS, DocstringPair
from moe_fast.demo.settings import DemoSettings
from moe_fast.losses import InfoNCELoss
from moe_fast.training import (
    DomainBatchSampler,
    DomainDataCollator,
    ExpertUsageCallback,
    MoESentenceTransformerTrainer,
)

DENSE = "dense"
ENFORCED = "MoE, enforced"
ROUTED = "MoE, routed"
VARIANTS: dict[str, str] = {
    DENSE: "the pretrained model itself, fine-tuned",
    ENFORCED: f"{len(DOMAINS)} experts; a text's domain, given with it, is its expert",
    ROUTED: f"{len(DOMAINS)} experts; a learned router sends each token to one; domains unknown",
}


@dataclass(frozen=True)
class Trained:
    """A fine-tuned model with what its training cost.

    Attributes:
        model: in evaluation mode.
        seconds: wall time of the training loop.
        losses: (training pairs seen, loss) of every step.
    """

    model: SentenceTransformer
    seconds: float
    losses: list[tuple[float, float]]


def build_variant(variant: str, folder: Path, settings: DemoSettings) -> SentenceTransformer:
    """A fresh copy of the pretrained model, dense or with its MLPs turned into experts."""
    dense = SentenceTransformer(str(folder), device=settings.device)
    if variant == ENFORCED:
        return moe_fast.upcycle(
            dense, num_experts=len(DOMAINS), routing="enforced", domains=DOMAINS, seed=settings.seed
        )
    if variant == ROUTED:
        return moe_fast.upcycle(
            dense, num_experts=len(DOMAINS), routing="token_topk", seed=settings.seed
        )
    return dense


def train_variant(
    model: SentenceTransformer, pairs: Sequence[DocstringPair], settings: DemoSettings
) -> Trained:
    """Fine-tune a model, in place, on one pass over the pairs."""
    set_seed(settings.seed)
    losses = LossCurve(settings.batch_size)
    callbacks: list[TrainerCallback] = [losses]
    if is_mixture(model):
        callbacks.append(ExpertUsageCallback(log_shares=False))
    with tempfile.TemporaryDirectory() as folder:
        trainer = MoESentenceTransformerTrainer(
            model=model,
            args=training_arguments(folder, settings),
            train_dataset=as_dataset(pairs),
            loss=InfoNCELoss(model, temperature=settings.temperature, symmetric=True),
            data_collator=collator(model, settings),
            callbacks=callbacks,
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(OneLineProgress())
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return Trained(model.eval(), seconds, losses.points)


def as_dataset(pairs: Sequence[DocstringPair]) -> Dataset:
    """Two text columns, in the order the loss takes them, and the column that names the domain."""
    return Dataset.from_dict(
        {
            "query": [pair.query for pair in pairs],
            "document": [pair.document for pair in pairs],
            "domain": [pair.domain for pair in pairs],
        }
    )


def collator(model: SentenceTransformer, settings: DemoSettings) -> DomainDataCollator:
    """Tokenizes queries and documents, each to its own length, and hands the domains on as ids."""
    return DomainDataCollator.from_model(
        model,
        domains=DOMAINS,
        router_mapping={"query": "query", "document": "document"},
        max_length={"query": settings.query_tokens, "document": settings.document_tokens},
    )


def training_arguments(folder: str, settings: DemoSettings) -> SentenceTransformerTrainingArguments:
    """One epoch; each batch holds every domain's share."""
    return SentenceTransformerTrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        batch_sampler=DomainBatchSampler,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,  # below 1: a share of all steps
        seed=settings.seed,
        disable_tqdm=False,
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=settings.device != "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )


def save_model(model: SentenceTransformer, folder: Path) -> None:
    """Save beside `folder` first, so that it never holds half a model."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def count_parameters(model: SentenceTransformer) -> tuple[int, int]:
    """(parameters that one token visits, all parameters)."""
    encoder: Any = model.transformers_model
    total = encoder.num_parameters()
    return (encoder.num_parameters(only_active=True) if is_mixture(model) else total), total


def is_mixture(model: SentenceTransformer) -> bool:
    """Whether its encoder has experts."""
    return bool(getattr(model.transformers_model.config, "num_experts", None))


def is_enforced(model: SentenceTransformer) -> bool:
    """Whether it wants to be told each text's domain."""
    return getattr(model.transformers_model.config, "routing", None) == "enforced"


class LossCurve(TrainerCallback):
    """Collects the loss of every step."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.points: list[tuple[float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        if logs and "loss" in logs:
            self.points.append((state.global_step * self.batch_size, float(logs["loss"])))


class OneLineProgress(ProgressCallback):
    """A progress bar that shows the loss behind it, where the stock one prints a line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)
