from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

pytest.importorskip("datasets")

from moe_fast.data import read_pairs


def _write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


ROWS = [
    {"a": "one, and", "b": "ei\nns", "domain": "x", "label": 1, "extra": [1]},
    {"a": "two", "b": "zwei “ü”", "domain": "y", "label": 0, "extra": None},
]
CSV = 'a,b,domain,label,extra\n"one, and","ei\nns",x,1,e\ntwo,zwei “ü”,y,0,\n'


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.csv", "p.csv.gz", "P.JSONL"])
def test_both_formats_give_the_same_dataset(tmp_path: Path, name: str) -> None:
    text = CSV if ".csv" in name else "\n\n".join(map(json.dumps, ROWS))
    data = read_pairs(_write(tmp_path / name, text))
    assert data.column_names == ["a", "b", "domain", "label"]
    assert data.to_list() == [{k: v for k, v in row.items() if k != "extra"} for row in ROWS]


def test_optional_columns_may_be_absent_and_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    data = read_pairs(_write(tmp_path / "p.csv", "\ufeffa,b\nx,y\n"))
    assert data.to_list() == [{"a": "x", "b": "y"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"a": "x", "c": "y"}', r"line 1: column 'b' is missing; .*\['a', 'c'\]"),
        ("p.csv", "a,c\nx,y\n", r"line 2: column 'b' is missing; .*\['a', 'c'\]"),
        ("p.jsonl", '{"a": "x", "b": "y"}\n{"a": ', "line 2: not valid JSON"),
        ("p.jsonl", '["x", "y"]', "line 1: expected a JSON object"),
        ("p.csv", "a,b\nx,y\nx\n", "line 3: 1 cells, but the header names 2"),
        ("p.csv", "a,b\nx,y,z,w\n", "line 2: 4 cells, but the header names 2"),
        ("p.csv", 'a,b\n"x"y,z\n', "line 2: not valid CSV"),
        ("p.jsonl", '{"a": "x", "b": "  "}', "line 1: b is empty"),
        ("p.jsonl", '{"a": null, "b": "y"}', "line 1: a must be a string, got NoneType"),
        ("p.jsonl", '{"a": "x", "b": "y", "domain": ""}', "line 1: domain is empty"),
        ("p.jsonl", '{"a": "x", "b": "y", "label": 2}', "label=2; allowed are 0 and 1"),
        ("p.jsonl", '{"a": "x", "b": "y", "label": true}', "label=True; allowed are 0 and 1"),
        (
            "p.jsonl",
            '{"a": "x", "b": "y", "label": 1}\n{"a": "x", "b": "y"}',
            "line 2: columns .* in every row or in none",
        ),
        ("p.jsonl", "\n", "no pairs in this file"),
        ("p.csv", "", "no pairs in this file"),
        ("p.parquet", "", r"unknown format; supported are \.jsonl, \.jsonl\.gz, \.csv"),
    ],
)
def test_mistakes_are_reported_with_their_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_pairs(_write(tmp_path / name, text))
    assert name in str(error.value)


def test_not_utf8_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"a,b\nx,caf\xe9\n")
    with pytest.raises(ValueError, match=r"p\.csv.*not UTF-8"):
        read_pairs(path)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "none.jsonl")
