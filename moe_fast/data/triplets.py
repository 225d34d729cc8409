"""Triplets: a pair and the hard negatives of its first text, one column each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_fast.data import checks
from moe_fast.data.columns import Columns
from moe_fast.data.rows import Row
from moe_fast.data.sources import Source, open_source
from moe_fast.data.tables import build_dataset

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

NEGATIVE = re.compile(r"negative_([0-9]+)")


def read_triplets(
    source: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Read triplets: ``a``, ``b`` and ``negative_1`` .. ``negative_G``, the same G in every row.

    Args:
        source, keep, split, name, streaming: see `read_pairs`.
        columns: {our name: the source's name} where they differ, as
            ``{"a": "anchor", "b": "positive", "negative_1": "negative"}``.

    Returns:
        A dataset with the columns ``a``, ``b``, ``negative_1`` .. ``negative_G`` (str), and
        ``domain`` (str) where the source has it; other columns are left out.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_pairs`; and ValueError for negatives
            that are not numbered 1 .. G, and for a negative with the same text as ``b``.
    """
    columns = columns or {}
    opened = open_source(source, split=split, name=name, streaming=streaming)
    negatives = _negatives(opened, columns)
    required = dict.fromkeys(("a", "b", *negatives), checks.text)
    wanted = Columns(required, {"domain": checks.text}, columns, keep)
    return build_dataset(opened, _Triplets(wanted, negatives).read, streaming=streaming)


@dataclass(frozen=True)
class _Triplets:
    wanted: Columns
    negatives: tuple[str, ...]

    def read(self, row: Mapping[str, Any], where: str) -> Row:
        known = {*self.negatives, *self.wanted.renamed.values()}
        if more := sorted(_numbered(row) - known):
            raise ValueError(
                f"{where}: column {more[0]!r}, but the first row has "
                f"{len(self.negatives)} negatives; all rows must have as many"
            )
        triplet = self.wanted.read(row, where)
        for column in self.negatives:
            if triplet[column] == triplet["b"]:
                raise ValueError(f"{where}: {column} is the same text as b: {triplet['b'][:60]!r}")
        return triplet


def _negatives(source: Source, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the negatives, from the first row."""
    where, row = next(source.rows(), ("", None))
    if row is None:
        raise ValueError(f"{source}: no rows")
    names = _numbered(columns) | (_numbered(row) - set(columns.values()))
    numbered = tuple(f"negative_{g}" for g in range(1, len(names) + 1))
    if not names or set(numbered) != names:
        raise ValueError(
            f"{where}: negatives must be numbered negative_1, negative_2, ...; got "
            f"{sorted(names)}; columns present: {sorted(row)}"
        )
    return numbered


def _numbered(names: Iterable[str]) -> set[str]:
    return {name for name in names if NEGATIVE.fullmatch(name)}
