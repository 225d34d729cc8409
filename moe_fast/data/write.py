"""Writes rows to files that the readers of this package can read.

A file gets its name only when it is complete.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from moe_fast.data import flag_rows, pairs, papers
from moe_fast.data.columns import Columns
from moe_fast.data.file_formats import FORMATS, Row, file_format
from moe_fast.data.sources import DatasetSource
from moe_fast.data.tables import BATCH_ROWS, checked_rows, features_of
from moe_fast.files import atomic_write

Rows = Iterable[Mapping[str, Any]]
LIST_FORMATS = (".jsonl", ".jsonl.gz", ".parquet")  # a cell of CSV cannot hold a list


def write_pairs(rows: Rows, path: str | os.PathLike[str]) -> int:
    """Write text pairs to a file that `read_pairs` reads.

    Args:
        rows: a dataset or any iterable of rows: ``a``, ``b``, optional ``domain`` and ``label``,
            and further columns of text or numbers. May be an iterator, which is consumed once, and
            larger than memory.
        path: a ``.jsonl``, ``.csv`` or ``.tsv`` file, also with ``.gz`` appended, or a ``.parquet``
            file. An existing file is replaced. The same rows give the same bytes, compressed or
            not.

    Returns:
        The number of rows written.

    Raises:
        ValueError: the format is unknown, there are no rows, or `read_pairs` would refuse a row. No
            file is written, and an existing file is kept.
    """
    return _write(rows, path, Columns(pairs.REQUIRED, pairs.OPTIONAL), FORMATS)


def write_flag_rows(rows: Rows, path: str | os.PathLike[str]) -> int:
    """Write FlagEmbedding rows to a file that `read_flag_rows` reads.

    Args:
        rows: a dataset or any iterable of rows with the columns of `read_flag_rows`, and further
            columns of text or numbers. May be an iterator, which is consumed once, and larger than
            memory.
        path: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file. An existing file is replaced.

    Returns:
        The number of rows written.

    Raises:
        ValueError: the format is unknown, there are no rows, or `read_flag_rows` would refuse a
            row. No file is written, and an existing file is kept.
    """
    wanted = flag_rows.FlagRowColumns(flag_rows.REQUIRED, flag_rows.OPTIONAL)
    return _write(rows, path, wanted, LIST_FORMATS)


def write_papers(rows: Rows, path: str | os.PathLike[str]) -> int:
    """Write papers to a file that `read_papers` reads.

    Args:
        rows: a dataset or any iterable of rows with the columns of `read_papers`. May be an
            iterator, which is consumed once, and larger than memory.
        path: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file. An existing file is replaced.

    Returns:
        The number of rows written.

    Raises:
        ValueError: the format is unknown, there are no rows, or a row lacks an id or an abstract.
            No file is written, and an existing file is kept.
    """
    return _write(rows, path, Columns(papers.REQUIRED, papers.OPTIONAL), LIST_FORMATS)


def _write(
    rows: Rows, path: str | os.PathLike[str], wanted: Columns, formats: Sequence[str]
) -> int:
    """Check and write the `wanted` columns, and all further columns of the first row unchanged."""
    path, rows = Path(path), iter(rows)
    write = _WRITERS[file_format(path, formats)]
    first = list(itertools.islice(rows, 1))
    keep = [name for row in first for name in row if name not in wanted.known]
    source = DatasetSource(itertools.chain(first, rows), "rows")
    with atomic_write(path) as temporary:
        return write(checked_rows(source, replace(wanted, keep=keep)), temporary)


def _write_jsonl(rows: Iterator[Row], path: Path) -> int:
    count = 0
    with open_text(path) as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _write_csv(rows: Iterator[Row], path: Path, delimiter: str = ",") -> int:
    count = 0
    with open_text(path) as file:
        # With all text in quotes, a lone carriage return or an empty cell is read back as text.
        writer = csv.writer(
            file, delimiter=delimiter, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"
        )
        for count, row in enumerate(rows, start=1):
            if count == 1:
                writer.writerow(row)
            writer.writerow(row.values())
    return count


def _write_parquet(rows: Iterator[Row], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = next(rows)
    schema = features_of(first).arrow_schema
    rows = itertools.chain([first], rows)
    count = 0
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Open a UTF-8 file to write, compressed if its name ends in ``.gz``."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if path.suffix.lower() == ".gz":  # without name and time, equal rows give equal bytes
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(file, "utf-8", newline=""))


_WRITERS: dict[str, Callable[[Iterator[Row], Path], int]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".tsv": partial(_write_csv, delimiter="\t"),
    ".parquet": _write_parquet,
}
