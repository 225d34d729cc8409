"""Text pairs from JSONL and CSV files.

Columns: `a` and `b`, the two texts; optional `domain`, a name; optional `label`, 0 or 1. A file of
either format may be compressed (`.gz`). The file is checked while it is read, so that a mistake is
reported with the file and the line, and not as a strange loss an hour later.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

TEXT_COLUMNS = ("a", "b")
FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")


def read_pairs(path: str | os.PathLike[str]) -> Dataset:
    """Read a file of text pairs.

    Args:
        path: a ``.jsonl``, ``.jsonl.gz``, ``.csv`` or ``.csv.gz`` file in UTF-8. JSONL: one object
            per line, blank lines are passed over. CSV: a header line names the columns.

    Returns:
        A dataset with the columns ``a`` and ``b`` (str), and ``domain`` (str) and ``label`` (int64)
        where the file has them; other columns are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown format; a column is missing; a line cannot be parsed; text that is not
            UTF-8; a text that is empty or no string; a label that is neither 0 nor 1; an optional
            column in some rows only; no rows.
        ImportError: ``datasets`` is not installed.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise ImportError("read_pairs needs datasets: pip install 'moe-fast[train]'") from error

    path = Path(path)
    rows = _read_jsonl(path) if _format(path).startswith(".jsonl") else _read_csv(path)
    try:
        columns = _collect(rows, path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    if not columns:
        raise ValueError(f"{path}: no pairs in this file")
    return Dataset.from_dict(columns)


def _collect(rows: Iterator[tuple[int, dict[str, Any]]], path: Path) -> dict[str, list[Any]]:
    """Check every row and turn rows into columns."""
    columns: dict[str, list[Any]] = {}
    for line, row in rows:
        pair = _check_row(row, f"{path}, line {line}")
        if columns and pair.keys() != columns.keys():
            raise ValueError(
                f"{path}, line {line}: columns {sorted(pair)}, but the lines before have "
                f"{sorted(columns)}; an optional column must be in every row or in none"
            )
        for name, value in pair.items():
            columns.setdefault(name, []).append(value)
    return columns


def _format(path: Path) -> str:
    for suffix in FORMATS:
        if path.name.lower().endswith(suffix):
            return suffix
    raise ValueError(f"path={str(path)!r}: unknown format; supported are {', '.join(FORMATS)}")


def _open(path: Path) -> IO[str]:
    # newline="" as the csv module asks; utf-8-sig drops the mark that spreadsheet programs write
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(path) as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {line}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {line}: expected a JSON object, got {text[:60].strip()!r}"
                )
            yield line, row


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    line = 0

    def counted(file: IO[str]) -> Iterator[str]:
        nonlocal line  # the reader's own count lags behind when it meets an error
        for line, text in enumerate(file, start=1):  # noqa: B007
            yield text

    with _open(path) as file:
        reader = csv.DictReader(counted(file), strict=True)
        try:
            for row in reader:
                _check_cells(row, reader.fieldnames or (), f"{path}, line {line}")
                yield line, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: not valid CSV ({error})") from error


def _check_cells(row: dict[Any, Any], header: Sequence[str], where: str) -> None:
    """DictReader files surplus cells under the key None, and fills missing ones with None."""
    if None in row or None in row.values():
        found = sum(value is not None for key, value in row.items() if key is not None)
        found += len(row.get(None, ()))
        raise ValueError(f"{where}: {found} cells, but the header names {len(header)}")


def _check_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The wanted columns of one row, checked."""
    pair: dict[str, Any] = {}
    for name in TEXT_COLUMNS:
        if name not in row:
            raise ValueError(f"{where}: column {name!r} is missing; columns present: {sorted(row)}")
        pair[name] = _check_text(row[name], name, where)
    if "domain" in row:
        pair["domain"] = _check_text(row["domain"], "domain", where)
    if "label" in row:
        if isinstance(row["label"], bool) or str(row["label"]).strip() not in {"0", "1"}:
            raise ValueError(f"{where}: label={row['label']!r}; allowed are 0 and 1")
        pair["label"] = int(row["label"])
    return pair


def _check_text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {name} must be a string, got {type(value).__name__} ({value!r})"
        )
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty")
    return value
