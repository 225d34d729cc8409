"""Reads pairs of texts that belong together, or whose label says whether they do.

The columns are `a` and `b`, the two texts, and optionally `label`, 0 or 1, and `domain`, a name.
Everything is checked while it is read, so that a mistake is reported with the file and the line,
and not noticed an hour later by a strange loss.
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
        columns: {our name: the source's name} such as ``{"a": "title"}``, for columns that have
            neither our name nor one of the names in `moe_fast.data.columns.SPELLINGS`.
        keep: further columns of the source, text or numbers, that the result shall have too, for
            example for `split_by`. Remove them before training, because a trainer takes them for
            texts.
        split: the split of a dataset; a file has no splits.
        name: the configuration of a dataset that has several.
        streaming: return an ``IterableDataset`` that reads the source while it is iterated, for
            data larger than memory.
        delimiter: the character between the cells of a CSV file. By default it is a tab for
            ``.tsv``; for ``.csv`` it is guessed from the header.
        skip_invalid: leave out invalid rows, and warn how many there were and what is wrong with
            the first ones. By default the first invalid row is an error. A file that cannot be
            read to its end is always an error.

    Returns:
        A dataset with the columns ``a`` and ``b`` (str), and ``domain`` (str) and ``label`` (int64)
        if the source has them and they are not null. Other columns are left out, and named in one
        warning. Class labels are read by their names. If streaming, only the first row is checked
        at once, and the others while they are read.

    Raises:
        FileNotFoundError: there is no such file or dataset.
        ValueError: the format is unknown, there are no rows, or the file is broken or truncated.
        ValueError: a column is missing, or two columns fit one of our names.
        ValueError: a line is not UTF-8 or cannot be parsed.
        ValueError: a text is empty or not a string, or `moe_fast.data.checks.label` refuses a
            label.
        ValueError: only some rows have an optional column.
        TypeError: `source` is none of the above.
        ImportError: ``datasets`` is not installed.

    An error names the file and the line where the record begins.
    """
    wanted = Columns(REQUIRED, OPTIONAL, columns or {}, keep)
    opened = open_source(source, split=split, name=name, streaming=streaming, delimiter=delimiter)
    return build_dataset(opened, wanted, streaming=streaming, skip_invalid=skip_invalid)
