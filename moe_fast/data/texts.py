"""Reads single texts, to embed or to search, from files of any size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from moe_fast.data import checks
from moe_fast.data.lines import check_file, read_lines
from moe_fast.data.rows import FORMATS, Row, file_format, read_rows

TEXT_FORMATS = (".txt", ".txt.gz", *FORMATS)


def read_texts(
    path: str | os.PathLike[str],
    column: str = "text",
    *,
    domain_column: str = "domain",
    delimiter: str | None = None,
) -> Iterator[tuple[int, str, str | None]]:
    """Iterate over the texts of a file, without holding the file in memory.

    Args:
        path: ``.txt`` (one text per line, ended by LF or CR LF), ``.jsonl``, ``.csv``, ``.tsv``,
            each also as ``.gz`` (all UTF-8), or ``.parquet``.
        column: of the text; not for ``.txt``.
        domain_column: of the text's domain, where the file has one; not for ``.txt``.
        delimiter: see `read_pairs`.

    Returns:
        An iterator of (row, text, domain): the row counts texts from 0, as the rows of an array of
        their embeddings do; the domain is None where the file has no such column.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown format, at once; while iterating, with the file and the line: a text
            that is empty (a blank line of a ``.txt`` too) or no string, a missing column, a domain
            in some rows only, text that is not UTF-8, a line that cannot be parsed, no texts, a
            file that breaks off.
    """
    path = Path(path)
    kind = file_format(path, TEXT_FORMATS)
    check_file(path)
    if kind == ".txt":
        if delimiter is not None:
            raise ValueError(f"delimiter={delimiter!r}: {path} is no CSV file")
        return _number(path, _from_lines(path))
    rows = read_rows(path, delimiter=delimiter)
    return _number(path, _from_rows(rows, column, domain_column))


def _number(
    path: Path, texts: Iterator[tuple[str, str | None]]
) -> Iterator[tuple[int, str, str | None]]:
    row = -1
    for row, (text, domain) in enumerate(texts):
        yield row, text, domain
    if row < 0:
        raise ValueError(f"{path}: no texts")


def _from_lines(path: Path) -> Iterator[tuple[str, None]]:
    for line, text in read_lines(path):
        text = text.removesuffix("\n").removesuffix("\r")
        yield checks.text(text, "the text", f"{path}, line {line}"), None


def _from_rows(
    rows: Iterator[tuple[str, Row]], column: str, domain_column: str
) -> Iterator[tuple[str, str | None]]:
    has_domain: bool | None = None
    for where, row in rows:
        checks.present(row, [column], where)
        if has_domain is None:
            has_domain = row.get(domain_column) is not None
        if has_domain != (row.get(domain_column) is not None):
            raise ValueError(
                f"{where}: column {domain_column!r} is in some rows only; it must be in every row "
                "or in none"
            )
        domain = checks.text(row[domain_column], domain_column, where) if has_domain else None
        yield checks.text(row[column], column, where), domain
