"""Texts of a file of any size, one after the other, each with its id, domain and place."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_fast.data import checks
from moe_fast.data.lines import read_lines
from moe_fast.data.rows import FORMATS, file_format, read_rows

ID_COLUMNS = ("id", "_id")
TEXT_FORMATS = (".txt", ".txt.gz", *FORMATS)


@dataclass(frozen=True)
class TextRow:
    """A text of a file.

    Attributes:
        text: never empty.
        id: the row's ``id`` or ``_id``; its number, counted from 0, where it has neither.
        domain: where asked for.
        where: the file and line, for messages.
    """

    text: str
    id: str
    domain: str | None
    where: str


def read_text_rows(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] = ("text",),
    domain_column: str | None = None,
) -> Iterator[TextRow]:
    """Yield the texts of a file, holding a part of it in memory.

    Args:
        path: ``.txt`` (one text per line), ``.jsonl``, ``.csv`` (any of the three also ``.gz``), or
            ``.parquet``.
        columns: the columns that hold the text; several are joined by a space, and of several
            some may be empty. Not used for ``.txt``.
        domain_column: the column that holds the text's domain.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown format, a column that is missing, an empty text, a broken line; with
            the file and the line. A blank line in a ``.txt`` file is an empty text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if file_format(path, TEXT_FORMATS) == ".txt":
        if domain_column is not None:
            raise ValueError(
                f"{path}: domain_column={domain_column!r} needs a file with columns "
                f"({', '.join(FORMATS)}); this one holds texts alone"
            )
        for line, text in read_lines(path):
            where = f"{path}, line {line}"
            yield TextRow(
                checks.text(text.rstrip("\r\n"), "text", where), str(line - 1), None, where
            )
        return
    for number, (where, row) in enumerate(read_rows(path)):
        checks.present(row, [*columns, *([domain_column] if domain_column else [])], where)
        domain = checks.text(row[domain_column], domain_column, where) if domain_column else None
        key = next((row[name] for name in ID_COLUMNS if name in row), number)
        yield TextRow(_joined(row, columns, where), _checked_id(key, where), domain, where)


def _joined(row: dict, columns: Sequence[str], where: str) -> str:
    if len(columns) == 1:
        return checks.text(row[columns[0]], columns[0], where)
    parts = [row[name] or "" for name in columns]
    for name, part in zip(columns, parts, strict=True):
        if part != "":
            checks.text(part, name, where)
    return checks.text(" ".join(part for part in parts if part), " + ".join(columns), where)


def _checked_id(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(f"{where}: id must be text or a whole number; got {value!r}")
    return str(value)
