"""Rows of JSONL, CSV and Parquet files, each with its place.

Every reader of this package goes through here, so that a broken file is reported in the same words
wherever it is read: the file, and the line (text formats) or the row (Parquet), counted from 1.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from moe_fast.extras import missing

FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
Row = dict[str, Any]
CSV_CELL_LIMIT = 1 << 30  # characters; Python's own 131,072 refuses long documents


def file_format(path: str | os.PathLike[str], formats: Sequence[str] = FORMATS) -> str:
    """The format of a file by its name, without ``.gz``: ``".jsonl"``, ``".csv"``, ...

    Raises:
        ValueError: none of `formats`, which are listed.
    """
    name = Path(path).name.lower()
    for suffix in formats:
        if name.endswith(suffix):
            return suffix.removesuffix(".gz")
    raise ValueError(f"path={str(path)!r}: unknown format; supported are {', '.join(formats)}")


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of a file of any size, holding a part of it in memory.

    Args:
        path: ``.jsonl`` or ``.csv``, both also as ``.gz``, in UTF-8, or ``.parquet``. JSONL: one
            object per line. CSV: a header line names the columns; all values are strings. Blank
            lines are passed over in both.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown format; not UTF-8; a broken or truncated file; a line that cannot be
            parsed; a name given twice in an object or a header.
    """
    path = Path(path)
    return _READERS[file_format(path)](path)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its line feed) of a UTF-8 text file, ``.gz`` or not.

    Only a line feed ends a line. A leading byte order mark, as spreadsheet programs write it, is
    dropped.
    """
    number = 0
    try:
        with open_binary(path) as file:
            for number, raw in enumerate(file, start=1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error})") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}, after line {number}: truncated or broken gzip file ({error})"
        ) from error


def open_binary(path: Path) -> IO[bytes]:
    """Open a file to read bytes, through gzip where its name ends so."""
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """An ``object_pairs_hook`` for json that refuses a key given twice: json keeps the last one."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice in one object")
    return row


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    for line, text in read_lines(path):
        if not text.strip():
            continue
        where = f"{path}, line {line}"
        try:
            row = json.loads(text, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:  # the latter: nested too deeply
            raise ValueError(f"{where}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {text[:60].strip()!r}")
        yield where, row


def read_cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (place, cells) of a CSV file, the header included; blank lines are passed over.

    Raises:
        ValueError: as `read_rows`.
    """
    csv.field_size_limit(max(csv.field_size_limit(), CSV_CELL_LIMIT))
    line = 0

    def counted() -> Iterator[str]:
        nonlocal line  # the csv module's own count lags behind when it meets an error
        for line, text in read_lines(path):  # noqa: B007
            yield text

    try:
        for cells in csv.reader(counted(), strict=True):
            if cells:
                yield f"{path}, line {line}", cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: not valid CSV ({error})") from error


def _read_csv(path: Path) -> Iterator[tuple[str, Row]]:
    rows = read_cells(path)
    where, header = next(rows, ("", []))
    _check_names(header, where)
    for where, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{where}: {len(cells)} cells, but the header names {len(header)}")
        yield where, dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing("pyarrow", "train", "reading Parquet", error) from error
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path}, after row {number}: not readable as Parquet ({error})"
        ) from error


def _check_names(names: Sequence[str], where: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{where}: column {twice[0]!r} is named twice")


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
