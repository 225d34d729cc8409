"""Reads pairs of sentences with a human score of their similarity, as in STS-B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_fast.data import checks
from moe_fast.data.columns import Columns
from moe_fast.data.csv_rows import read_cells
from moe_fast.data.file_formats import Row
from moe_fast.data.lines import Refuse, refuse
from moe_fast.data.sources import AnySource, FileSource, Source, open_source
from moe_fast.data.tables import build_dataset

if TYPE_CHECKING:
    from datasets import Dataset

REQUIRED = {"a": checks.text, "b": checks.text, "score": checks.number}


def read_sts(
    source: AnySource,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    name: str | None = None,
    delimiter: str | None = None,
    skip_invalid: bool = False,
) -> Dataset:
    """Read scored sentence pairs.

    Args:
        source: a source as for `read_pairs`, with the columns ``a``, ``b`` and ``score``, or names
            in `moe_fast.data.columns.SPELLINGS` such as ``sentence1`` and ``sentence2``; or a CSV
            file without a header that has these three cells in each line. A file has no header if
            its first line has three cells and the third is a number.
        columns: {our name: the source's name} for columns with other names.
        split, name, delimiter, skip_invalid: see `read_pairs`.

    Returns:
        A dataset with the columns ``a``, ``b`` (str), ``score`` (float64, on the source's scale),
        and ``domain`` (str) if the source has it.

    Raises:
        FileNotFoundError, ValueError, TypeError, ImportError: as `read_pairs`.
        ValueError: a score is not a finite number.
    """
    opened: Source = open_source(source, split=split, name=name, delimiter=delimiter)
    if isinstance(opened, FileSource) and opened.delimiter is not None and _has_no_header(opened):
        opened = _HeaderlessCsv(opened.path, opened.delimiter)
    wanted = Columns(REQUIRED, {"domain": checks.text}, columns or {})
    return build_dataset(opened, wanted, skip_invalid=skip_invalid)


@dataclass(frozen=True)
class _HeaderlessCsv:
    path: Path
    delimiter: str

    def __str__(self) -> str:
        return str(self.path)

    def rows(self, invalid: Refuse = refuse) -> Iterator[tuple[str, Row]]:
        for where, cells in read_cells(self.path, self.delimiter, invalid):
            if len(cells) == 3:
                yield where, dict(zip(REQUIRED, cells, strict=True))
            else:
                invalid(
                    ValueError(f"{where}: {len(cells)} cells; expected sentence, sentence, score")
                )


def _has_no_header(source: FileSource) -> bool:
    _, cells = next(read_cells(source.path, source.delimiter or ","), ("", []))
    try:
        float(cells[2])
    except (IndexError, ValueError):
        return False
    return len(cells) == 3
