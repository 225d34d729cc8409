from __future__ import annotations

import itertools
import json
import pickle
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from datasets import Dataset, IterableDataset

from moe_fast.data import read_pairs
from tests.data.files import write, write_jsonl, write_parquet

ROWS = [
    {"a": "one, and", "b": "ei\nns", "domain": "x", "label": 1, "extra": "e"},
    {"a": "two", "b": "zwei “ü”", "domain": "y", "label": 0, "extra": ""},
]
CSV = 'a,b,domain,label,extra\n"one, and","ei\nns",x,1,e\ntwo,zwei “ü”,y,0,\n'
WANTED = [{k: v for k, v in row.items() if k != "extra"} for row in ROWS]


def _file(folder: Path, name: str) -> Path:
    if name.endswith(".parquet"):
        return write_parquet(folder / name, ROWS)
    return write(folder / name, CSV if ".csv" in name else "\n\n".join(map(json.dumps, ROWS)))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.csv", "p.csv.gz", "p.parquet"])
def test_every_format_gives_the_same_dataset(tmp_path: Path, name: str, streaming: bool):
    data = read_pairs(_file(tmp_path, name), streaming=streaming)
    assert isinstance(data, IterableDataset if streaming else Dataset)
    assert data.column_names == ["a", "b", "domain", "label"]
    assert {name: value.dtype for name, value in data.features.items()} == {
        "a": "string",
        "b": "string",
        "domain": "string",
        "label": "int64",
    }
    for _ in range(2):  # a stream starts again
        assert list(data) == WANTED


def test_columns_are_renamed_and_kept_on_request(tmp_path: Path):
    rows = [
        {"question": "q", "b": "old", "answer": "r", "focus": "f", "n": 3, "x": 0.5},
        {"question": "s", "b": "old", "answer": "t", "focus": "", "n": 4, "x": 1.0},
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    data = read_pairs(path, columns={"a": "question", "b": "answer"}, keep=("focus", "n", "x"))
    assert data.to_list() == [
        {"a": "q", "b": "r", "focus": "f", "n": 3, "x": 0.5},
        {"a": "s", "b": "t", "focus": "", "n": 4, "x": 1.0},
    ]


def test_a_column_given_to_another_is_no_longer_itself(tmp_path: Path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"a": "x", "b": "y", "domain": "z"}])
    swapped = read_pairs(path, columns={"a": "b", "b": "a"})
    assert swapped.to_list() == [{"a": "y", "b": "x", "domain": "z"}]
    assert read_pairs(path, columns={"b": "domain"}).to_list() == [{"a": "x", "b": "z"}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": {"c": "a"}}, "columns: unknown column 'c'; known are .*'a', 'b', 'domain'"),
        ({"columns": {"a": "b"}}, "columns: 'b' is named twice"),
        ({"columns": {"a": "x", "domain": "x"}}, "columns: 'x' is named twice"),
        ({"columns": {"label": "y"}}, r"line 1: column 'y' is missing; .*\['a', 'b'\]"),
        ({"keep": ["focus"]}, r"line 1: column 'focus' is missing; .*\['a', 'b'\]"),
        ({"keep": ["a"]}, "keep: 'a' is named twice"),
        ({"keep": "focus"}, "keep must be a list of column names; got 'focus'"),
        ({"split": "test"}, "split='test', name=None: .* is a file, which has neither splits"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict, message: str):
    path = write_jsonl(tmp_path / "p.jsonl", [{"a": "x", "b": "y"}])
    with pytest.raises(ValueError, match=message):
        read_pairs(path, **arguments)


MISTAKES = [
    ("p.jsonl", '{"a": "x", "c": "y"}', r"line 1: column 'b' is missing; .*\['a', 'c'\]"),
    ("p.csv", "a,c\nx,y\n", r"line 2: column 'b' is missing; .*\['a', 'c'\]"),
    ("p.jsonl", '{"a": "x", "b": "y"}\n{"a": ', "line 2: not valid JSON"),
    ("p.csv", "a,b\nx,y\nx\n", "line 3: 1 cells, but the header names 2"),
    ("p.jsonl", '{"a": "x", "b": "  "}', "line 1: b is empty"),
    ("p.csv", 'a,b\nx,y\nx,""\n', "line 3: b is empty"),
    ("p.jsonl", '{"a": null, "b": "y"}', "line 1: a must be a string, got NoneType"),
    ("p.jsonl", '{"a": "x", "b": "y\\ud800"}', "line 1: b is not valid Unicode"),
    ("p.jsonl", '{"a": "x", "b": "y", "domain": ""}', "line 1: domain is empty"),
    ("p.jsonl", '{"a": "x", "b": "y", "label": 2}', "line 1: label=2; allowed are 0 and 1"),
    ("p.jsonl", '{"a": "x", "b": "y", "label": 0.5}', "label=0.5; allowed are 0 and 1"),
    ("p.csv", "a,b,label\nx,y,yes\n", "line 2: label='yes'; allowed are 0 and 1, true and"),
    (
        "p.jsonl",
        '{"a": "x", "b": "y", "label": 1}\n{"a": "x", "b": "y"}',
        r"line 2: columns \['a', 'b'\], but .*'label'.* in every row or in none",
    ),
    ("p.jsonl", "\n", r"p\.jsonl: no rows"),
    ("p.csv", "", r"p\.csv: no rows"),
    ("p.csv", "a,b\n", r"p\.csv: no rows"),
    ("p.parquet", "", "not readable as Parquet"),
    ("p.xlsx", "", r"unknown format; supported are \.jsonl, \.jsonl\.gz, \.csv"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "text", "message"), MISTAKES)
def test_mistakes_are_reported_with_their_place(
    tmp_path: Path, name: str, text: str, message: str, streaming: bool
):
    with pytest.raises(ValueError, match=message) as error:
        list(read_pairs(write(tmp_path / name, text), streaming=streaming))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["x"], r"line 2: a column that is kept must hold text or numbers; n is list \(\['x'\]\)"),
        (None, "line 2: a column that is kept must hold text or numbers; n is NoneType"),
        ("1", "line 2: n is of type str, but int in the rows before"),
        (2**63, "line 2: n=9223372036854775808 does not fit 64 bits"),
    ],
)
def test_a_kept_column_has_one_type(tmp_path: Path, value: object, message: str):
    rows = [{"a": "x", "b": "y", "n": 1}, {"a": "x", "b": "y", "n": value}]
    with pytest.raises(ValueError, match=message):
        read_pairs(write_jsonl(tmp_path / "p.jsonl", rows), keep=["n"])


def test_a_stream_reads_as_it_goes(tmp_path: Path):
    """The first row is checked at once, a later one when its turn comes."""
    path = write(tmp_path / "p.jsonl", '{"a": "x", "b": "y"}\n' * 3 + '{"a": "x"}\n')
    data = read_pairs(path, streaming=True)
    assert len(list(itertools.islice(data, 3))) == 3
    with pytest.raises(ValueError, match="line 4: column 'b' is missing"):
        list(data)


def test_a_stream_goes_to_a_worker_and_resumes(tmp_path: Path):
    rows = [{"a": str(i), "b": "y"} for i in range(10)]
    data = read_pairs(write_jsonl(tmp_path / "p.jsonl", rows), streaming=True)
    assert list(pickle.loads(pickle.dumps(data))) == rows
    first = list(itertools.islice(data, 4))
    state = data.state_dict()
    rest = read_pairs(tmp_path / "p.jsonl", streaming=True)
    rest.load_state_dict(state)
    assert first + list(rest) == rows


def test_a_missing_file_says_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_pairs(tmp_path / "none.jsonl")


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install -e '.\[train\]'"):
        read_pairs(write_jsonl(tmp_path / "p.jsonl", [{"a": "x", "b": "y"}]))
