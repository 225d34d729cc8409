"""Samples batches by domain: with all domains evenly mixed, or of one domain each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch import Tensor

from moe_fast.ops.checks import check_choice, check_count
from moe_fast.training.hashing import stable_hash

if TYPE_CHECKING:
    from datasets import Dataset

_MODES = ("mixed", "single")


class DomainBatchSampler(DefaultBatchSampler):
    """Samples every row once per epoch, in batches of evenly mixed domains or of one domain each.

    "mixed": the share of each domain in a batch is its share of the dataset, to about two rows.
    "single": all rows of a batch have the same domain, so that in-batch negatives are harder and,
    with enforced routing, a batch uses one expert. The batches are in random order; the last batch
    of each domain may be smaller.

    The order depends on ``seed`` and the epoch (:meth:`set_epoch`) alone, so that a resumed run
    gets the batches that an uninterrupted one would have got.

    Use it as ``batch_sampler`` of sentence-transformers' training arguments: the class itself, or
    ``functools.partial(DomainBatchSampler, mode="single", domain_column="source")``.

    Args:
        dataset: a ``datasets.Dataset`` with a domain column.
        batch_size: the number of rows in a batch, >= 1.
        drop_last: leave out batches that are smaller ("single": at most one per domain).
        valid_label_columns, generator: part of sentence-transformers' signature; not used.
        seed: of the order.
        mode: "mixed" or "single".
        domain_column: the column that holds each row's domain, a name or an id.

    Raises:
        TypeError: the batch size is not an int.
        ValueError: the mode is unknown, or the batch size is below 1.
        ValueError: the domain column is missing, or a row has no domain.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        *,
        mode: str = "mixed",
        domain_column: str = "domain",
    ) -> None:
        check_choice("mode", mode, _MODES)
        check_count("batch_size", batch_size)
        super().__init__(
            dataset,
            batch_size=batch_size,
            drop_last=drop_last,
            valid_label_columns=valid_label_columns,
            generator=generator,
            seed=seed,
        )
        self.mode = mode
        self.rows_of_domain = _rows_of_domain(dataset, domain_column)
        self._rows_per_batch = batch_size
        if mode == "single" and not drop_last:
            # accelerate's BatchSamplerShard drops batches when one before the end is smaller than
            # `batch_size`; with None it expects batches of different sizes.
            self.batch_size: int | None = None

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator()
        generator.manual_seed(stable_hash(f"{self.seed}:{self.epoch}"))
        shuffled = [
            rows[torch.randperm(len(rows), generator=generator)]
            for rows in self.rows_of_domain.values()
        ]
        if self.mode == "mixed":
            yield from self._batches(_spread_evenly(shuffled, generator))
            return
        batches = [batch for rows in shuffled for batch in self._batches(rows)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]

    def __len__(self) -> int:
        sizes = [len(rows) for rows in self.rows_of_domain.values()]
        if self.mode == "mixed":
            sizes = [sum(sizes)]
        size = self._rows_per_batch
        return sum(n // size if self.drop_last else -(-n // size) for n in sizes)

    def _batches(self, rows: Tensor) -> list[list[int]]:
        batches = [chunk.tolist() for chunk in rows.split(self._rows_per_batch) if len(chunk)]
        if self.drop_last and batches and len(batches[-1]) < self._rows_per_batch:
            batches.pop()
        return batches


@contextmanager
def fixed_sizes(samplers: Sequence[Any]) -> Iterator[bool]:
    """Give every sampler a batch size, for the time of the block.

    A `DomainBatchSampler` whose batches differ in size has the batch size None, but
    sentence-transformers needs a number to combine samplers. The block gets True if there is such a
    sampler: the combined sampler's batch size must then be set to None as well.
    """
    varying = [s for s in samplers if isinstance(s, DomainBatchSampler) and s.batch_size is None]
    for sampler in varying:
        sampler.batch_size = sampler._rows_per_batch
    try:
        yield bool(varying)
    finally:
        for sampler in varying:
            sampler.batch_size = None


def _rows_of_domain(dataset: Dataset, column: str) -> dict[Any, Tensor]:
    """Return {domain: its row numbers, [n] int64}, in the order in which domains first appear.

    Raises:
        ValueError: the column is missing, or a row has no domain.
    """
    if column not in dataset.column_names:
        raise ValueError(
            f"the dataset has no column {column!r} (domain_column) to compose batches by; "
            f"its columns are {list(dataset.column_names)}."
        )
    values = list(dataset.with_format(None)[column])
    if None in values:
        count = Counter(values)[None]
        raise ValueError(f"column {column!r} must name a domain in every row; {count} have none.")
    rows: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(value, []).append(row)
    return {value: torch.tensor(numbers) for value, numbers in rows.items()}


def _spread_evenly(domains: list[Tensor], generator: torch.Generator) -> Tensor:
    """Order all rows, [N], so that any consecutive rows have about the domains' overall shares.

    The k-th of a domain's n rows gets the position (k + offset) / n, with one random offset per
    domain; the rows are sorted by position. An interval of positions then holds its share of every
    domain, rounded up or down.
    """
    if not domains:
        return torch.empty(0, dtype=torch.int64)
    places = []
    for rows in domains:
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        places.append((torch.arange(len(rows), dtype=torch.float64) + offset) / len(rows))
    return torch.cat(domains)[torch.cat(places).argsort(stable=True)]
