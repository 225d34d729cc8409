"""Reads the texts of a file of any size one after the other, with their ids and domains."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moe_fast.data import checks
from moe_fast.data.file_formats import FORMATS, Row, file_format, read_row_group, read_rows
from moe_fast.data.lines import Refuse, check_file, read_lines, refuse

ID_COLUMNS = ("id", "_id")
TEXT_FORMATS = (".txt", ".txt.gz", *FORMATS)


@dataclass(frozen=True)
class TextRow:
    """A text of a file.

    Attributes:
        text: the text, never empty.
        id: the row's ``id`` or ``_id``; if it has neither, the number of the text, from 0.
        domain: the text's domain; None unless a column for it was given.
        where: the file and line, for messages.
    """

    text: str
    id: str
    domain: str | None
    where: str


def read_texts(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] = ("text",),
    domain_column: str | None = None,
    id_column: str | None = None,
    delimiter: str | None = None,
    invalid: Refuse = refuse,
) -> Iterator[TextRow]:
    """Yield the texts of a file; only a part of the file is in memory at a time.

    Args:
        path: a ``.txt`` file (one text per line), ``.jsonl``, ``.csv`` or ``.tsv`` file, also with
            ``.gz`` appended, or a ``.parquet`` file.
        columns: the columns that hold the text. Several are joined by spaces; some of them may be
            empty, but not all. Not used for ``.txt``.
        domain_column: the column that holds the text's domain.
        id_column: the column that holds the text's id, if it is neither ``id`` nor ``_id``.
        delimiter: the character between the cells of a CSV file. By default it is a tab for
            ``.tsv``; for ``.csv`` it is guessed from the header.
        invalid: called with the error of a row that cannot be read. If it returns, reading goes on
            with the next row. By default it raises.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the format is unknown, or the file has no row.
        ValueError: a ``.txt`` file is read with a domain column, an id column or a delimiter.
        ValueError: a column is missing, a text is empty, or a line cannot be parsed; the error
            names the file and the line. A blank line in a ``.txt`` file is an empty text.
    """
    path = Path(path)
    check_file(path)
    if file_format(path, TEXT_FORMATS) == ".txt":
        asked = {"domain_column": domain_column, "id_column": id_column, "delimiter": delimiter}
        for name, value in asked.items():
            if value is not None:
                raise ValueError(
                    f"{path}: {name}={value!r} needs a file with columns ({', '.join(FORMATS)}); "
                    "this one holds texts alone"
                )
        lines = ((f"{path}, line {line}", text) for line, text in read_lines(path, invalid))
        read: Iterator[tuple[str, Any]] = lines
        take: Callable[[Any, int, str], TextRow] = _line
    else:
        read = read_rows(path, delimiter=delimiter, invalid=invalid)
        take = partial(_row, columns=columns, domain_column=domain_column, id_column=id_column)
    number, where = 0, None
    for where, content in read:
        try:
            row = take(content, number, where)
        except ValueError as error:
            invalid(error)
        else:
            number += 1
            yield row
    if where is None:
        raise ValueError(f"{path}: no texts in this file")


def read_texts_of_row_group(
    path: str | os.PathLike[str],
    row_group: int,
    *,
    first_row: int,
    first_number: int,
    columns: Sequence[str] = ("text",),
    domain_column: str | None = None,
    id_column: str | None = None,
) -> Iterator[TextRow]:
    """Yield the texts of one row group of a Parquet file, as `read_texts` yields those of a file.

    Args:
        path, row_group, first_row: as for :func:`moe_fast.data.file_formats.read_row_group`.
        first_number: the number of its first text, which is its id if there is no column of ids.
        columns, domain_column, id_column: as for `read_texts`.

    Raises:
        ValueError: a column is missing, or a text, an id or a domain is invalid; the error names
            the file and the row.
    """
    for number, (where, row) in enumerate(read_row_group(path, row_group, first_row), first_number):
        yield _row(
            row,
            number,
            where,
            columns=columns,
            domain_column=domain_column,
            id_column=id_column,
        )


def _line(text: str, number: int, where: str) -> TextRow:
    return TextRow(checks.text(text.rstrip("\r\n"), "text", where), str(number), None, where)


def _row(
    row: Row,
    number: int,
    where: str,
    *,
    columns: Sequence[str],
    domain_column: str | None,
    id_column: str | None,
) -> TextRow:
    checks.present(row, [*columns, *(c for c in (domain_column, id_column) if c)], where)
    domain = checks.text(row[domain_column], domain_column, where) if domain_column else None
    ids = (id_column,) if id_column else ID_COLUMNS
    key = next((row[name] for name in ids if name in row), number)
    return TextRow(_joined(row, columns, where), checks.identifier(key, "id", where), domain, where)


def _joined(row: dict, columns: Sequence[str], where: str) -> str:
    if len(columns) == 1:
        return checks.text(row[columns[0]], columns[0], where)
    parts = [row[name] or "" for name in columns]
    for name, part in zip(columns, parts, strict=True):
        if part != "":
            checks.text(part, name, where)
    return checks.text(" ".join(part for part in parts if part), " + ".join(columns), where)
