"""MedQuAD: ten steps at batch 2,048 against the same pairs, in the same order, at batch 64.

    python -m experiments.large_batch pairs_medquad_question_answer.jsonl.gz

One mixture with its experts by domain, one loss, the same texts seen; what differs is how many of
them are each other's negatives, how many steps are taken, and the learning rate of a step. The
large batch goes through :class:`moe_fast.losses.CachedLoss`. Scores are those of
:mod:`experiments.medquad`, whose split this is: no disease, question or answer on both sides.
Writes ``large_batch.json`` and ``large_batch.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformerTrainingArguments
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import set_seed

from experiments import medquad
from experiments.medquad import ENFORCED, PLACES, PRETRAINED, interval, machine
from moe_fast.data import Retrieval
from moe_fast.demo.pretrained import MODEL_NAME, pretrained_folder
from moe_fast.evaluation import compare
from moe_fast.files import atomic_write
from moe_fast.losses import CachedLoss, InfoNCELoss
from moe_fast.training import MoESentenceTransformerTrainer


@dataclass(frozen=True)
class Settings:
    """Every number that somebody chose.

    Attributes:
        train_pairs: different ones; a whole number of large batches, so that none holds a pair
            twice.
        large_steps: of the large batch; the small one sees as many pairs.
        small_rate, large_rate: learning rates; the large one is the small one times the root of
            the batches' ratio, rounded.
        tokens_per_chunk: of the gradient cache.
        questions, answers, tokens, warmup, temperature, seed: as in the MedQuAD experiment.
    """

    train_pairs: int = 6144
    large_batch: int = 2048
    small_batch: int = 64
    large_steps: int = 10
    small_rate: float = 1e-4
    large_rate: float = 5e-4
    tokens_per_chunk: int = 4096
    questions: int = 1000
    answers: int = 4000
    tokens: int = 64
    warmup: float = 0.1
    temperature: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train_pairs % self.large_batch or self.large_batch % self.small_batch:
            raise ValueError(
                "train_pairs must be a multiple of large_batch, and that of small_batch; got "
                f"{self.train_pairs}, {self.large_batch} and {self.small_batch}."
            )


def main() -> None:
    """Run the experiment from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="the pairs: a, b, domain, focus")
    parser.add_argument("--model", type=Path, help=f"a SentenceTransformer (default: {MODEL_NAME})")
    parser.add_argument("--output", type=Path, default=Path("experiments/results"))
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    data, model, output = (arguments.pop(name) for name in ("data", "model", "output"))
    run(data, model or pretrained_folder(), output, Settings(**arguments))


def run(data: Path, model: Path, output: Path, settings: Settings) -> dict[str, Any]:
    """Everything; returns what ``large_batch.json`` holds."""
    start = time.perf_counter()
    shared = _medquad_settings(settings)
    train, test = medquad.load(data, shared)
    seen = in_order(train, settings)
    domains = sorted(set(train["domain"]) | set(test.corpus_domains.values()))
    systems: dict[str, dict[str, Any]] = {}
    batches = {"small": settings.small_batch, "large": settings.large_batch}
    for name in (PRETRAINED, *batches):
        encoder = medquad.build(ENFORCED, model, domains, shared)
        trained: dict[str, Any] = {}
        if name in batches:
            rate = settings.small_rate if name == "small" else settings.large_rate
            print(f"\n== batch {batches[name]}, learning rate {rate}", flush=True)
            trained = fine_tune(encoder, seen, batches[name], rate, settings)
        label = f"batch {batches[name]:,}" if name in batches else name
        systems[label] = measure(encoder, test, shared) | trained
    results = {
        "what": (__doc__ or "").split("\n")[0],
        "settings": asdict(settings),
        "data": medquad.describe(train, test) | {"pairs seen": len(seen)},
        "machine": machine(),
        "differences": differences(systems),
        "systems": {
            name: row | {place: row[place].to_dict() for place in PLACES}
            for name, row in systems.items()
        },
        "minutes": (time.perf_counter() - start) / 60,
    }
    for name, text in (
        ("large_batch.json", json.dumps(results, indent=1) + "\n"),
        ("large_batch.md", markdown(results)),
    ):
        with atomic_write(output / name) as partial_file:
            partial_file.write_text(text, encoding="utf-8")
    print("\n" + markdown(results))
    return results


def _medquad_settings(settings: Settings) -> medquad.Settings:
    return medquad.Settings(
        train_pairs=settings.train_pairs,
        questions=settings.questions,
        answers=settings.answers,
        tokens=settings.tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )


def in_order(train: Dataset, settings: Settings) -> Dataset:
    """The pairs as they are seen: shuffled epochs one after the other, cut at the last step."""
    wanted = settings.large_steps * settings.large_batch
    epochs = -(-wanted // len(train))
    shuffled = [train.shuffle(seed=settings.seed + epoch) for epoch in range(epochs)]
    return concatenate_datasets(shuffled).select(range(wanted))


def fine_tune(
    model: Any, seen: Dataset, batch_size: int, rate: float, settings: Settings
) -> dict[str, Any]:
    """Each pair once, in order, in place: what was logged at each step, and seconds."""
    set_seed(settings.seed)
    loss = InfoNCELoss(model, temperature=settings.temperature, symmetric=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch_size,
            batch_sampler=_sequential,
            learning_rate=rate,
            warmup_steps=settings.warmup,  # below 1: a share of all steps
            seed=settings.seed,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = MoESentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=seen,
            loss=CachedLoss(loss, tokens_per_chunk=settings.tokens_per_chunk)
            if batch_size == settings.large_batch
            else loss,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    model.eval()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"training seconds": seconds, "steps": len(history), "history": history}


def _sequential(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def measure(model: Any, test: Retrieval, settings: medquad.Settings) -> dict[str, Any]:
    """Scores over everything and within the query's own domain."""
    return medquad.measure(ENFORCED, model, test, settings)


def differences(systems: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The large batch minus each other system, paired by question."""
    *others, large = systems
    return [
        {"searched": place, "first": large, "second": other}
        | {"differences": compare(systems[large][place], systems[other][place]).to_dict()}
        for other in others
        for place in PLACES
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """Two tables: what each batch size scores, and the differences."""
    rows = [
        "| system | steps | nDCG@10 | MRR@10 | Recall@10 | nDCG@10 in own domain | training |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["systems"].items():
        scores = [row[PLACES[0]]["scores"]["all"][m] for m in ("nDCG@10", "MRR@10", "Recall@10")]
        scores.append(row[PLACES[1]]["scores"]["all"]["nDCG@10"])
        seconds = f"{row['training seconds']:.0f} s" if "steps" in row else "-"
        cells = [name, str(row.get("steps", "-")), *map(interval, scores), seconds]
        rows.append(f"| {' | '.join(cells)} |")
    rows += ["", "| difference, paired | nDCG@10 | nDCG@10 in own domain |", "| --- | --- | --- |"]
    found = results["differences"]
    for whole, own in zip(found[::2], found[1::2], strict=True):
        cells = [
            interval(d["differences"]["differences"]["all"]["nDCG@10"], "+") for d in (whole, own)
        ]
        rows.append(f"| {whole['first']} - {whole['second']} | {' | '.join(cells)} |")
    settings = results["settings"]
    note = (
        f"{results['data']['pairs seen']:,} pairs of {settings['train_pairs']:,} different ones, "
        f"texts cut at {settings['tokens']} tokens; 95 % bootstrap intervals over questions; "
        f"{results['minutes']:.0f} minutes."
    )
    return "\n".join([*rows, "", note, ""])


if __name__ == "__main__":
    main()
