"""Compares ten steps at batch 2,048 with 320 steps at batch 64 on the same pairs of MedQuAD.

    python -m experiments.large_batch pairs_medquad_question_answer.jsonl.gz

Both trainings start from the same mixture with one expert per domain, use the same loss, and see
the same pairs in the same order. They differ in the number of negatives, of steps, and in the
learning rate. The large batch is trained by :class:`moe_fast.losses.CachedLoss`. The split is that
of :mod:`experiments.medquad`: no disease, question or answer is on both sides. The results are
written to ``large_batch.json`` and ``large_batch.md``.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from torch.utils.data import BatchSampler, SequentialSampler

from experiments import medquad
from moe_fast.demo import comparison
from moe_fast.demo.comparison import ENFORCED, PRETRAINED, System
from moe_fast.losses import CachedLoss


@dataclass(frozen=True)
class Settings(medquad.Settings):
    """The settings of the experiment.

    Attributes:
        train_pairs: the number of different pairs; a multiple of ``large_batch``, so that no batch
            holds a pair twice.
        batch_size, learning_rate: of the small batch.
        large_batch, large_rate: of the large one; its rate is that of the small one times the root
            of the ratio of the batch sizes, rounded.
        large_steps: of the large batch; the small one sees as many pairs.
        tokens_per_chunk: of the gradient cache.
    """

    train_pairs: int = 6144
    tokens: int = 64
    batch_size: int = 64
    large_batch: int = 2048
    large_rate: float = 5e-4
    large_steps: int = 10
    tokens_per_chunk: int = 4096

    def __post_init__(self) -> None:
        if self.train_pairs % self.large_batch or self.large_batch % self.batch_size:
            raise ValueError(
                "train_pairs must be a multiple of large_batch, and that of batch_size; got "
                f"{self.train_pairs}, {self.large_batch} and {self.batch_size}."
            )


def main() -> None:
    """Run the experiment from the command line."""
    run(*medquad.parse(__doc__ or "", Settings()))


def run(data: Path, model: Path, output: Path, settings: Settings) -> dict[str, System]:
    """Run the whole experiment; return the systems, the large batch last."""
    start = time.perf_counter()
    train, test = medquad.load(data, settings)
    seen = in_order(train, settings)
    domains = comparison.domains_of(train, test)

    def mixture() -> Any:
        return comparison.build(ENFORCED, model, domains, settings)

    systems = {PRETRAINED: comparison.measure(PRETRAINED, mixture(), test, settings)}
    for size, rate in (
        (settings.batch_size, settings.learning_rate),
        (settings.large_batch, settings.large_rate),
    ):
        encoder, name = mixture(), f"batch {size:,}"
        loss = comparison.loss_of(ENFORCED, encoder, settings)
        if size == settings.large_batch:
            loss = CachedLoss(loss, tokens_per_chunk=settings.tokens_per_chunk)
        trained = comparison.fine_tune(
            encoder,
            seen,
            loss,
            settings,
            per_device_train_batch_size=size,
            learning_rate=rate,
            batch_sampler=sequential,
        )
        systems[name] = comparison.measure(name, encoder, test, settings, *trained)
    *others, large = systems
    data_used = comparison.describe(train, test) | {"pairs seen": {"all": len(seen)}}
    minutes = (time.perf_counter() - start) / 60
    comparison.write(
        output, "large_batch", systems, {large: others}, data_used, asdict(settings), minutes
    )
    return systems


def in_order(train: Dataset, settings: Settings) -> Dataset:
    """Return the pairs in the order of training: shuffled epochs, cut after the last step."""
    wanted = settings.large_steps * settings.large_batch
    epochs = -(-wanted // len(train))
    shuffled = [train.shuffle(seed=settings.seed + epoch) for epoch in range(epochs)]
    return concatenate_datasets(shuffled).select(range(wanted))


def sequential(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    """Make batches of the rows as they come, for the trainer's ``batch_sampler``."""
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


if __name__ == "__main__":
    main()
