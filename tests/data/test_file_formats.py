from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="needs the extra moe-fast[train]")

from moe_fast.data.file_formats import read_rows
from tests.data.files import write, write_parquet

ROWS = [{"a": "one, and", "b": 'ei\nns "x"'}, {"a": "two\u2028", "b": "zwei “ü”"}]
CSV = 'a,b\r\n"one, and","ei\nns ""x"""\r\n\ntwo\u2028,zwei “ü”\n'
JSONL = '{"a": "one, and", "b": "ei\\nns \\"x\\""}\r\n\n {"a": "two\u2028", "b": "zwei “ü”"}'


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.csv", "r.csv.gz", "R.JSONL"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_formats_give_the_same_rows_with_their_lines(tmp_path: Path, name: str, mark: str):
    path = write(tmp_path / name, mark + (CSV if ".csv" in name else JSONL))
    places, rows = zip(*read_rows(path), strict=True)
    assert list(rows) == ROWS
    # a CSV record begins where its first line does: the first one takes lines 2 and 3
    lines = (2, 5) if ".csv" in name else (1, 3)
    assert places == tuple(f"{path}, line {line}" for line in lines)


def test_parquet_counts_rows_over_batches(tmp_path: Path):
    path = write_parquet(tmp_path / "r.parquet", [{"a": str(i)} for i in range(2500)])
    read = list(read_rows(path))
    assert [row["a"] for _, row in read] == [str(i) for i in range(2500)]
    assert read[2000][0] == f"{path}, row 2001"


def test_a_long_cell_is_read(tmp_path: Path):
    [(_, row)] = read_rows(write(tmp_path / "r.csv", "a\n" + "x" * 200_000))
    assert len(row["a"]) == 200_000  # Python's csv module stops at 131,072 by default


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": ', "line 2: not valid JSON"),
        ("r.jsonl", '["x", "y"]', r"line 1: expected a JSON object, got '\[\"x\", \"y\"\]'"),
        ("r.jsonl", '{"a": 1}\n' + "[" * 100_000, "line 2: not valid JSON .*recursion"),
        ("r.jsonl", '{"a": 1, "b": 2, "a": 3}', "line 1: not valid JSON .*'a' is given twice"),
        ("r.csv", "a,b\nx,y\nx\n", "line 3: 1 cells, but the header names 2"),
        ("r.csv", "a,b\nx,y,z,w\n", "line 2: 4 cells, but the header names 2"),
        ("r.csv", 'a,b\n"x"y,z\n', "line 2: not valid CSV"),
        ("r.csv", 'a,b\nx,y\n"x,\n\n', r"line 3: not valid CSV \(a quote .* is never closed"),
        ("r.csv", "a,b,a\nx,y,z\n", "line 1: column 'a' is named twice"),
        ("r.parquet", "no parquet", "after row 0: not readable as Parquet"),
        ("r.parquet", "", "after row 0: not readable as Parquet"),
        ("r.xlsx", "", r"unknown format; supported are \.jsonl, \.jsonl\.gz, \.csv"),
    ],
)
def test_broken_files_are_reported_with_their_place(
    tmp_path: Path, name: str, text: str, message: str
):
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(write(tmp_path / name, text)))
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv"])
def test_text_that_is_not_utf8_names_the_line(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_bytes(b'{"a":1}\n{"b":2}\ncaf\xe9\n')
    with pytest.raises(ValueError, match=rf"{name}, line 3: not UTF-8"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["r.jsonl.gz", "r.csv.gz"])
def test_a_truncated_gzip_file_says_how_far_it_goes(tmp_path: Path, name: str):
    lines = "\n".join(f'{{"number": {i * 7919 % 10_007}}}' for i in range(5_000))
    whole = gzip.compress(lines.encode())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{name}, after line [1-9]\d*: truncated or broken gzip"):
        list(read_rows(tmp_path / name))


def test_a_file_that_is_no_gzip_file(tmp_path: Path):
    (tmp_path / "r.jsonl.gz").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"after line 0: truncated or broken gzip .*Not a gzipped"):
        list(read_rows(tmp_path / "r.jsonl.gz"))


def test_a_truncated_parquet_file(tmp_path: Path):
    path = write_parquet(tmp_path / "r.parquet", [{"a": "x"}] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"r\.parquet, after row 0: not readable as Parquet"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["none.jsonl", "none.csv", "none.parquet", "none.csv.gz"])
def test_a_missing_file_says_so(tmp_path: Path, name: str):
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["r.jsonl", "r.csv", "r.parquet"])
def test_a_name_given_twice_among_very_many(tmp_path: Path, name: str):
    """Sixty thousand names: a reader that compared each with each would take minutes."""
    names = [f"n{i}" for i in range(60_000)] + ["n\x1b7"] * 2
    if name == "r.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = names[-3_000:]  # Parquet's own reader takes its time
        pq.write_table(pa.table([pa.array(["x"])] * len(names), names=names), tmp_path / name)
    elif name == "r.csv":
        write(tmp_path / name, ",".join(names) + "\n")
    else:
        keys = ", ".join(f"{json.dumps(key)}: 1" for key in names)
        write(tmp_path / name, "{" + keys + "}")
    with pytest.raises(ValueError, match=r"'n\\x1b7' is (named|given) twice") as error:
        list(read_rows(tmp_path / name))
    assert len(str(error.value)) < 300


def test_a_message_shows_a_part_of_a_line(tmp_path: Path):
    text = "[" + ", ".join(["1"] * 10**5) + "]"
    with pytest.raises(ValueError, match="expected a JSON object, got '") as error:
        list(read_rows(write(tmp_path / "r.jsonl", text)))
    assert len(str(error.value)) < 300


def test_numbers_beyond_all_bounds(tmp_path: Path):
    with pytest.raises(ValueError, match="line 1: not valid JSON .*4300 digits"):
        list(read_rows(write(tmp_path / "r.jsonl", '{"a": ' + "9" * 5000 + "}")))
