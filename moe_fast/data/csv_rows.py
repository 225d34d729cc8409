"""Reads the records of CSV files: their cells, and the line where each record begins."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

from moe_fast.data.lines import Refuse, read_lines, refuse

logger = logging.getLogger(__name__)
CELL_LIMIT = 1 << 28  # characters; Python's own 131,072 refuses long documents
DELIMITERS = (",", ";", "\t", "|")
_UNCLOSED = "unexpected end of data"
_EXPLAINED = {  # what the csv module's messages mean for the file
    _UNCLOSED: "a quote in the record that begins here is never closed",
    "new-line character": "a carriage return outside of quotes; a line ends with a line feed",
}


def check_delimiter(delimiter: str) -> None:
    """Raise ValueError unless it is one character that can stand between cells."""
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise ValueError(
            f"delimiter must be one character, such as ',', ';' or a tab; got {delimiter!r}"
        )


def guess_delimiter(path: Path) -> str:
    """Guesses the delimiter: the one of comma, semicolon, tab and bar that gives the most cells.

    A word is said about it unless it is a comma.
    """
    line = next((text for _, text in read_lines(path) if text.strip()), "")
    cells = {delimiter: _count(line, delimiter) for delimiter in DELIMITERS}
    best = max(DELIMITERS, key=cells.__getitem__)  # of equals the first
    if best != ",":
        logger.warning(
            "%s: read with %r between its cells, which parts the header into %d; "
            "delimiter=... or --delimiter says otherwise",
            path,
            best,
            cells[best],
        )
    return best


def read_cells(
    path: Path, delimiter: str = ",", invalid: Refuse = refuse
) -> Iterator[tuple[str, list[str]]]:
    """Yield (place, cells) of each record, the header's included; blank lines are passed over.

    Args:
        path: of the file.
        delimiter: between cells.
        invalid: takes the error of a record that cannot be parsed; where it returns, reading goes
            on with the line after it.

    Raises:
        ValueError: as `read_lines`; quotes in the wrong place; quotes that are never closed, with
            the line where their record begins.
    """
    check_delimiter(delimiter)
    _raise_cell_limit()
    line, header = 0, True

    def counted() -> Iterator[str]:
        nonlocal line  # the csv module's own count lags behind when it meets an error
        for line, text in read_lines(path):  # noqa: B007
            yield text

    lines = counted()
    records = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        where = f"{path}, line {line + 1}"
        try:
            cells = next(records, None)
        except csv.Error as error:
            said = str(error)
            meant = next(
                (text for start, text in _EXPLAINED.items() if said.startswith(start)), said
            )
            problem = ValueError(f"{where}: not valid CSV ({meant})")
            if header or said == _UNCLOSED:
                raise problem from error
            invalid(problem)
            continue
        if cells is None:
            return
        if cells:
            header = False
            yield where, cells


def _count(line: str, delimiter: str) -> int:
    _raise_cell_limit()
    try:
        return len(next(csv.reader([line], delimiter=delimiter), []))
    except csv.Error:
        return 0


def _raise_cell_limit() -> None:
    """Python has one limit for all readers; raising it changes what no other could read."""
    csv.field_size_limit(max(csv.field_size_limit(), CELL_LIMIT))
