"""Reads text pairs: two texts that belong together, or that a label says do or do not.

Columns: `a` and `b`, the two texts; optional `label`, 0 or 1; optional `domain`, a name. Everything
is checked while it is read, so that a mistake is reported with the file and the line, and not as a
strange loss an hour later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_fast.data import checks
from moe_fast.data.columns import Columns
from moe_fast.data.sources import AnySource, open_source
from moe_fast.data.tables import build_dataset

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

REQUIRED = {"a": checks.text, "b": checks.text}
OPTIONAL = {"domain": checks.text, "label": checks.label}


def read_pairs(
    source: AnySource,
    *,
    columns: Mapping[str, str] | None = None,
    keep: Sequence[str] = (),
    split: str = "train",
    name: str | None = None,
    streaming: bool = False,
    delimiter: str | None = None,
    skip_invalid: bool = False,
) -> Dataset | IterableDataset:
    """Read text pairs.

    Args:
        source: a ``.jsonl``, ``.csv`` or ``.tsv`` file (all UTF-8, also as ``.gz``) or a
            ``.parquet`` file; a folder written by ``Dataset.save_to_disk`` or laid out as a dataset
            repository; the id of a Hugging Face dataset, a str; or a ``Dataset`` or
            ``IterableDataset``.
        columns: {our name: the source's name} as ``{"a": "title"}``, for what is called neither by
            our name nor by one of `moe_fast.data.columns.SPELLINGS`.
        keep: further columns of the source, text or numbers, to hand on, for `split_by` say. The
            trainer would take them for texts: remove them before.
        split: of a dataset; a file has none.
        name: of a dataset's configuration, where it has several.
        streaming: give an ``IterableDataset`` that reads as it goes, for sets larger than memory.
        delimiter: between the cells of a CSV file; by default a tab for ``.tsv``, otherwise what
            the header says.
        skip_invalid: leave out rows that are not what they must be, and warn how many and which
            were the first; otherwise the first one is an error. The file must still be readable.

    Returns:
        A dataset with the columns ``a`` and ``b`` (str), and ``domain`` (str) and ``label`` (int64)
        where the source has them and they are not null; other columns are left out, and named in
        one warning. Class labels are read by their names. In memory, or streaming: then the first
        row is checked now and the others as they are read.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: unknown format; a column is missing, or two may be meant; a line cannot be
            parsed; text that is not UTF-8; a text that is empty or no string; a label that says
            neither 0 nor 1 (`moe_fast.data.checks.label`); an optional column in some rows only; no
            rows; a file that breaks off. The line is that where the record begins.
        TypeError: a source that is none of these.
        ImportError: ``datasets`` is not installed.
    """
    wanted = Columns(REQUIRED, OPTIONAL, columns or {}, keep)
    opened = open_source(source, split=split, name=name, streaming=streaming, delimiter=delimiter)
    return build_dataset(opened, wanted, streaming=streaming, skip_invalid=skip_invalid)
