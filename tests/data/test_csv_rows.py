"""CSV as spreadsheet programs and Python write it: cells, lines, delimiters."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast.data.csv_rows import DELIMITERS, guess_delimiter, read_cells
from moe_fast.data.file_formats import read_rows
from tests.data.files import write

CELL = st.text(
    st.sampled_from(',;\t|"\r\n \ufeff\u2028é猫x') | st.characters(exclude_categories=["Cs"])
)
TABLE = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(CELL, min_size=width, max_size=width), max_size=5)
)


@given(
    rows=TABLE,
    delimiter=st.sampled_from(DELIMITERS),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_what_python_writes_is_read_with_the_lines_where_records_begin(
    rows: list[list[str]], delimiter: str, quoting: int, end: str, mark: str
):
    if quoting == csv.QUOTE_MINIMAL and end == "\n":  # Python then leaves carriage returns bare
        rows = [[cell.replace("\r", "") for cell in row] for row in rows]
    header = [f"c{n}" for n in range(len(rows[0]) if rows else 2)]
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end)
    lines = []
    for row in [header, *rows]:
        lines.append(file.getvalue().count("\n") + 1)
        writer.writerow(row)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        path.write_bytes((mark + file.getvalue()).encode())
        read = list(read_cells(path, delimiter))
        assert [cells for _, cells in read] == [header, *rows]
        assert [place for place, _ in read] == [f"{path}, line {line}" for line in lines]
        if len(header) > 1:
            assert guess_delimiter(path) == delimiter


@pytest.mark.parametrize(
    ("name", "delimiter"), [("r.csv", ";"), ("r.csv", "\t"), ("r.csv", "|"), ("r.tsv.gz", "\t")]
)
def test_the_delimiter_is_that_of_the_header(tmp_path: Path, name: str, delimiter: str, caplog):
    text = 'a;b\n"x;1";"y, ""z"""\n'.replace(";", delimiter)
    [(_, row)] = read_rows(write(tmp_path / name, text))
    assert row == {"a": f"x{delimiter}1", "b": 'y, "z"'}
    said = [f"read with {delimiter!r} between its cells" in message for message in caplog.messages]
    assert said == ([] if ".tsv" in name else [True])


def test_a_delimiter_that_is_given_counts(tmp_path: Path, caplog):
    path = write(tmp_path / "r.csv", "a;b,c\n1;2,3\n")
    assert [row for _, row in read_rows(path, delimiter=";")] == [{"a": "1", "b,c": "2,3"}]
    assert [row for _, row in read_rows(path)] == [{"a;b": "1;2", "c": "3"}]
    assert not caplog.messages
    for wrong in ("", ";;", '"', "\n", "\0"):
        with pytest.raises(ValueError, match="delimiter must be one character"):
            read_rows(path, delimiter=wrong)
    with pytest.raises(ValueError, match=r"delimiter=';': .*r\.jsonl is no CSV file"):
        read_rows(write(tmp_path / "r.jsonl", "{}"), delimiter=";")


def test_a_mistake_names_the_line_where_its_record_begins(tmp_path: Path):
    text = 'a,b\n"one\ntwo",x\n\n"three\nfour",y,z\n'
    with pytest.raises(ValueError, match="line 5: 3 cells, but the header names 2"):
        list(read_rows(write(tmp_path / "r.csv", text)))
    with pytest.raises(ValueError, match=r"line 2: not valid CSV \(a quote .* is never closed"):
        list(read_rows(write(tmp_path / "r.csv", 'a,b\n"one\ntwo,x\n')))
    with pytest.raises(ValueError, match="line 1: not valid CSV .*a carriage return outside"):
        list(read_rows(write(tmp_path / "r.csv", "a,b\rx,y\r")))


def test_records_that_cannot_be_read_are_passed_over_on_request(tmp_path: Path):
    text = 'a,b\nx\n"x"y,z\n"one\ntwo"three,z\nx,y\n'
    wrong: list[ValueError] = []
    rows = list(read_rows(write(tmp_path / "r.csv", text), invalid=wrong.append))
    assert [row for _, row in rows] == [{"a": "x", "b": "y"}]
    assert [str(error).split(": ")[0].split(", ")[-1] for error in wrong] == [
        "line 2",
        "line 3",
        "line 4",
    ]


def test_a_broken_header_or_an_open_quote_is_never_passed_over(tmp_path: Path):
    for text in ('a,"b"c\nx,y\n', 'a,b\nx,y\n"z,\n'):
        with pytest.raises(ValueError, match="not valid CSV"):
            list(read_rows(write(tmp_path / "r.csv", text), invalid=lambda error: None))
