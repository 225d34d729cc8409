"""Text pairs: two texts that belong together, or, with a label, that do or do not.

Columns: `a` and `b`, the two texts; optional `label`, 0 or 1; optional `domain`, a name. Everything
is checked while it is read, so that a mistake is reported with the file and the line, and not as a
strange loss an hour later.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_fast.data import checks
from moe_fast.data.columns import Columns
from moe_fast.data.sources import open_source
from moe_fast.data.tables import build_dataset

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

REQUIRED = {"a": checks.text, "b": checks.text}
OPTIONAL = {"domain": checks.text, "label": checks.label}


def read_pairs(
    source: str | os.PathLike[str],
    *,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Read text pairs.

    Args:
        source: a ``.jsonl``, ``.jsonl.gz``, ``.csv``, ``.csv.gz`` (both UTF-8) or ``.parquet``
            file; a folder written by ``Dataset.save_to_disk`` or laid out as a dataset repository;
            or the id of a Hugging Face dataset, a str.
        columns: {our name: the source's name} where they differ, as ``{"a": "question"}``.
        keep: further columns of the source, text or numbers, to hand on, for `split_by` say. The
            trainer would take them for texts: remove them before.
        split: of a dataset; a file has none.
        name: of a dataset's configuration, where it has several.
        streaming: give an ``IterableDataset`` that reads as it goes, for sets larger than memory.

    Returns:
        A dataset with the columns ``a`` and ``b`` (str), and ``domain`` (str) and ``label`` (int64)
        where the source has them; other columns are left out. In memory, or streaming: then the
        first row is checked now and the others as they are read.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: unknown format; a column is missing; a line cannot be parsed; text that is not
            UTF-8; a text that is empty or no string; a label that is neither 0 nor 1; an optional
            column in some rows only; no rows; a file that breaks off.
        ImportError: ``datasets`` is not installed.
    """
    wanted = Columns(REQUIRED, OPTIONAL, columns or {}, keep)
    opened = open_source(source, split=split, name=name, streaming=streaming)
    return build_dataset(opened, wanted.read, streaming=streaming)
