"""Pairs of sentences with a gold score of their similarity, as in STS-B."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_fast.data import checks
from moe_fast.data.columns import Columns
from moe_fast.data.rows import Row, read_cells
from moe_fast.data.sources import FileSource, Source, open_source
from moe_fast.data.tables import build_dataset

if TYPE_CHECKING:
    from datasets import Dataset

REQUIRED = {"a": checks.text, "b": checks.text, "score": checks.number}
ALIASES = {"a": "sentence1", "b": "sentence2"}  # sentence-transformers' names


def read_sts(
    source: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    name: str | None = None,
) -> Dataset:
    """Read scored sentence pairs.

    Args:
        source: as for `read_pairs`, with columns ``a`` and ``b`` or ``sentence1`` and
            ``sentence2``, and ``score``; or a CSV file without a header whose three cells are
            these, recognised by a number in the third cell of its first line.
        columns: {our name: the source's name} where they differ from both.
        split, name: of a dataset; see `read_pairs`.

    Returns:
        A dataset with the columns ``a``, ``b`` (str), ``score`` (float64, on the source's scale),
        and ``domain`` (str) where the source has it.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_pairs`; and ValueError for a score that
            is no finite number.
    """
    opened: Source = open_source(source, split=split, name=name)
    if isinstance(opened, FileSource) and _has_no_header(opened.path):
        opened = _HeaderlessCsv(opened.path)
    columns = dict(columns or {})
    _, row = next(opened.rows(), ("", {}))
    for ours, alias in ALIASES.items():
        if ours not in row and alias in row:
            columns.setdefault(ours, alias)
    wanted = Columns(REQUIRED, {"domain": checks.text}, columns)
    return build_dataset(opened, wanted.read, streaming=False)


@dataclass(frozen=True)
class _HeaderlessCsv:
    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def rows(self) -> Iterator[tuple[str, Row]]:
        for where, cells in read_cells(self.path):
            if len(cells) != 3:
                raise ValueError(f"{where}: {len(cells)} cells; expected sentence, sentence, score")
            yield where, dict(zip(REQUIRED, cells, strict=True))


def _has_no_header(path: Path) -> bool:
    if ".csv" not in path.name.lower():
        return False
    _, cells = next(read_cells(path), ("", []))
    try:
        float(cells[2])
    except (IndexError, ValueError):
        return False
    return len(cells) == 3
