"""Reads the records of CSV files: their cells, and the line where each record begins."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from pathlib import Path

from moe_fast.data.lines import Refuse, read_lines, refuse

logger = logging.getLogger(__name__)
CELL_LIMIT = 1 << 28  # characters; Python's default of 131,072 refuses long documents
DELIMITERS = (",", ";", "\t", "|")
_UNCLOSED = "unexpected end of data"
_EXPLAINED = {  # what the csv module's messages mean for the file
    _UNCLOSED: "a quote in the record that begins here is never closed",
    "new-line character": "a carriage return outside of quotes; a line ends with a line feed",
}


def check_delimiter(delimiter: str) -> None:
    """Raise ValueError unless the delimiter is one character that can separate cells."""
    if not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise ValueError(
            f"delimiter must be one character, such as ',', ';' or a tab; got {delimiter!r}"
        )


def guess_delimiter(path: Path) -> str:
    """Guess the delimiter from the first line of a file that is not blank.

    Of comma, semicolon, tab and bar it is the one that splits the line into the most cells. Unless
    it is the comma, a warning says so.
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
    """Yield (place, cells) of each record, including the header; blank lines are skipped.

    Args:
        path: the file.
        delimiter: the character between cells.
        invalid: called with the error of a record that cannot be parsed. If it returns, reading
            goes on with the next line.

    Raises:
        FileNotFoundError, ValueError: as `read_lines`.
        ValueError: the delimiter cannot separate cells; see `check_delimiter`.
        ValueError: the header cannot be parsed, or `invalid` raises for a later record.
        ValueError: a quote is never closed; the error names the line where its record begins.
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
    """Raise Python's limit on the size of a cell.

    The limit is global. A higher one affects other readers only in cells that they refused before.
    """
    csv.field_size_limit(max(csv.field_size_limit(), CELL_LIMIT))
