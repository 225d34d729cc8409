"""Reads the rows of JSONL, CSV and Parquet files, each with its place in the file.

All readers of this package use it, so that all report a broken file in the same way: with the file
and the line (text formats) or the row (Parquet), counted from 1. A record of several lines has the
number of its first line.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from moe_fast.data import csv_rows
from moe_fast.data.lines import Refuse, check_file, read_lines, refuse
from moe_fast.extras import missing
from moe_fast.messages import listed, reason, shown

FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
CSV_FORMATS = (".csv", ".tsv")
Row = dict[str, Any]


def file_format(path: str | os.PathLike[str], formats: Sequence[str] = FORMATS) -> str:
    """Return the format of a file by its name, without ``.gz``: ``".jsonl"``, ``".csv"``, ...

    Raises:
        ValueError: the name ends in none of `formats`; the error lists them.
    """
    name = Path(path).name.lower()
    for suffix in formats:
        if name.endswith(suffix):
            return suffix.removesuffix(".gz")
    raise ValueError(
        f"path={shown(str(path), 500)}: unknown format; supported are {', '.join(formats)}"
    )


def read_rows(
    path: str | os.PathLike[str], *, delimiter: str | None = None, invalid: Refuse = refuse
) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of each record of a file; only a part of the file is in memory at a time.

    Args:
        path: a ``.jsonl``, ``.csv`` or ``.tsv`` file in UTF-8, also with ``.gz`` appended, or a
            ``.parquet`` file. JSONL has one object per line. The first line of CSV names the
            columns, and all values are strings. Blank lines are skipped in both.
        delimiter: the character between the cells of a CSV file. By default it is a tab for
            ``.tsv``; for ``.csv`` it is guessed from the header, with a warning if it is no comma.
        invalid: called with the error of a record that cannot be read. If it returns, reading goes
            on with the next record. By default it raises.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the format is unknown, or the path is not a regular file.
        ValueError: a text file is not UTF-8.
        ValueError: the file is broken or truncated, or a line cannot be parsed.
        ValueError: an object or a header has the same name twice.
        ValueError: a delimiter is given for a file that is not CSV.
        ImportError: pyarrow, which reads Parquet, is not installed.
    """
    path = Path(path)
    kind = file_format(path)
    check_file(path)
    delimiter = resolve_delimiter(path, delimiter)
    if delimiter is not None:
        return _read_csv(path, delimiter, invalid)
    return _read_jsonl(path, invalid) if kind == ".jsonl" else _read_parquet(path)


def resolve_delimiter(path: Path, delimiter: str | None = None) -> str | None:
    """Return the delimiter of a CSV file, given or guessed; None for a file of another format.

    Raises:
        ValueError: the delimiter cannot separate cells, or the file is not CSV.
    """
    kind = file_format(path)
    if delimiter is not None:
        csv_rows.check_delimiter(delimiter)
        if kind not in CSV_FORMATS:
            raise ValueError(f"delimiter={delimiter!r}: {path} is no CSV file")
        return delimiter
    if kind == ".tsv":
        return "\t"
    return csv_rows.guess_delimiter(path) if kind == ".csv" else None


def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """Raise ValueError for a key given twice; an ``object_pairs_hook`` for json.

    Without it json silently keeps the last value of such a key.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = _twice(key for key, _ in pairs)
        raise ValueError(f"the key {shown(twice)} is given twice in one object")
    return row


def _read_jsonl(path: Path, invalid: Refuse) -> Iterator[tuple[str, Row]]:
    for line, text in read_lines(path, invalid):
        if not text.strip():
            continue
        where = f"{path}, line {line}"
        try:
            row = _parse(text, where)
        except ValueError as error:
            invalid(error)
        else:
            yield where, row


def _parse(text: str, where: str) -> Row:
    try:
        row = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # the latter: nested too deeply
        raise ValueError(f"{where}: not valid JSON ({reason(error)})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {shown(text.strip())}")
    return row


def _read_csv(path: Path, delimiter: str, invalid: Refuse) -> Iterator[tuple[str, Row]]:
    records = csv_rows.read_cells(path, delimiter, invalid)
    where, header = next(records, ("", []))
    _check_names(header, where)
    for where, cells in records:
        if len(cells) == len(header):
            yield where, dict(zip(header, cells, strict=True))
        else:
            invalid(ValueError(f"{where}: {len(cells)} cells, but the header names {len(header)}"))


def read_row_group(
    path: str | os.PathLike[str], row_group: int, first_row: int
) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of each row of one row group of a Parquet file.

    Args:
        path: the file.
        row_group: the number of the row group, from 0.
        first_row: how many rows of the file come before it, for the places.

    Raises:
        ValueError: the file is broken or truncated.
    """
    return _read_parquet(Path(path), [row_group], first_row)


def _read_parquet(
    path: Path, row_groups: list[int] | None = None, number: int = 0
) -> Iterator[tuple[str, Row]]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise missing("pyarrow", "train", "reading Parquet", error) from error

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # damaged files make Arrow raise many kinds of errors
            raise ValueError(
                f"{path}, after row {number}: not readable as Parquet ({reason(error)})"
            ) from error

    with attempt(partial(pq.ParquetFile, path)) as file:
        _check_names(file.schema_arrow.names, str(path))
        classes = _class_names(file.schema_arrow.metadata or {})
        batches = file.iter_batches(batch_size=1000, row_groups=row_groups)
        while (batch := attempt(partial(next, batches, None))) is not None:
            for row in attempt(batch.to_pylist):
                number += 1
                where = f"{path}, row {number}"
                yield where, name_classes(row, classes, where)


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Read {column: names of its classes} from the metadata that the datasets library writes."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def name_classes(row: Row, classes: dict[str, list[str]], where: str) -> Row:
    """Replace the numbers of class labels in a row by their names, and -1 (unknown) by None.

    Args:
        row: the row; it is not changed.
        classes: {column: the names of its classes}.
        where: the place of the row, for the error message.

    Raises:
        ValueError: a number that is no class.
    """
    for column, names in classes.items():
        number = row.get(column)
        if isinstance(number, int) and not isinstance(number, bool):
            if not -1 <= number < len(names):
                raise ValueError(
                    f"{where}: {shown(column)} is {shown(number)}, which is none of its "
                    f"{len(names)} classes {listed(names)}"
                )
            row = {**row, column: None if number == -1 else names[number]}
    return row


def _check_names(names: Sequence[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: column {shown(_twice(names))} is named twice")


def _twice(names: Iterable[str]) -> str:
    """Return the first name that occurs more than once."""
    return next(name for name, times in Counter(names).items() if times > 1)
