"""Writes rows that the readers of this package read back; a file appears once it is whole."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from moe_fast.data import flag_rows, pairs
from moe_fast.data.columns import Columns
from moe_fast.data.lines import Refuse, refuse
from moe_fast.data.rows import FORMATS, Row, file_format
from moe_fast.data.tables import BATCH_ROWS, Check, checked_rows, features_of
from moe_fast.files import atomic_write

Rows = Iterable[Mapping[str, Any]]


def write_pairs(rows: Rows, path: str | os.PathLike[str]) -> int:
    """Write text pairs to a file that `read_pairs` reads.

    Args:
        rows: a dataset or any iterable of rows: ``a``, ``b``, optional ``domain`` and ``label``,
            and further columns of text or numbers. Consumed once; may be larger than memory.
        path: ``.jsonl``, ``.csv`` or ``.tsv``, each also as ``.gz``, or ``.parquet``; replaced
            where it exists. The same rows give the same bytes, compressed or not.

    Returns:
        How many rows were written.

    Raises:
        ValueError: unknown format, no rows, or a row that `read_pairs` would refuse; then there is
            no file, or still the old one.
    """
    rows, first = _peek(rows)
    keep = [name for name in first if name not in (*pairs.REQUIRED, *pairs.OPTIONAL)]
    return _write(rows, path, Columns(pairs.REQUIRED, pairs.OPTIONAL, keep=keep), FORMATS)


def write_flag_rows(rows: Rows, path: str | os.PathLike[str]) -> int:
    """Write FlagEmbedding rows to a file that `read_flag_rows` reads.

    Args:
        rows: a dataset or any iterable of rows with the columns of `read_flag_rows`, and further
            columns of text or numbers. Consumed once; may be larger than memory.
        path: ``.jsonl``, ``.jsonl.gz`` or ``.parquet``; replaced where it exists.

    Returns:
        How many rows were written.

    Raises:
        ValueError: as `write_pairs`, by the rules of `read_flag_rows`.
    """
    rows, first = _peek(rows)
    known = (flag_rows.REQUIRED, flag_rows.OPTIONAL)
    keep = [name for name in first if not any(name in columns for columns in known)]
    formats = [
        suffix for suffix in FORMATS if ".jsonl" in suffix or suffix == ".parquet"
    ]  # a cell holds no list
    return _write(rows, path, flag_rows.FlagRowColumns(*known, keep=keep), formats)


@dataclass(frozen=True)
class _Given:
    """Rows of the caller's, as a source to check."""

    given: Rows

    def __str__(self) -> str:
        return "rows"

    def rows(self, invalid: Refuse = refuse) -> Iterator[tuple[str, Row]]:
        for number, row in enumerate(self.given, start=1):
            yield f"rows, row {number}", dict(row)


def _peek(rows: Rows) -> tuple[Rows, Mapping[str, Any]]:
    rows = iter(rows)
    first = next(rows, None)
    return (rows, {}) if first is None else (itertools.chain([first], rows), first)


def _write(rows: Rows, path: str | os.PathLike[str], check: Check, formats: Iterable[str]) -> int:
    path = Path(path)
    write = _WRITERS[file_format(path, tuple(formats))]
    with atomic_write(path) as temporary:
        return write(checked_rows(_Given(rows), check), temporary)


def _write_jsonl(rows: Iterator[Row], path: Path) -> int:
    count = 0
    with open_text(path) as file:
        for count, row in enumerate(rows, start=1):  # noqa: B007
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _write_csv(rows: Iterator[Row], path: Path, delimiter: str = ",") -> int:
    count = 0
    with open_text(path) as file:
        # all text in quotes: a lone carriage return or an empty cell is then text as well
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
    """Open a UTF-8 file to write, through gzip where its name ends so."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if path.suffix.lower() == ".gz":  # no name and no time inside: equal rows, equal bytes
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        yield stack.enter_context(io.TextIOWrapper(file, "utf-8", newline=""))


_WRITERS: dict[str, Callable[[Iterator[Row], Path], int]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".tsv": partial(_write_csv, delimiter="\t"),
    ".parquet": _write_parquet,
}
