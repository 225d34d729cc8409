from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from moe_fast.data import read_sts
from tests.data.files import write, write_jsonl, write_parquet

ROWS = [{"a": "A man, here.", "b": "x", "score": 4.75}, {"a": "y", "b": "z", "score": 0.0}]
CELLS = '"A man, here.",x,4.75\ny,z,0\n'


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz"])
@pytest.mark.parametrize("header", ["", "a,b,score\n", "sentence1,sentence2,score\n"])
def test_csv_with_a_header_or_none(tmp_path: Path, name: str, header: str):
    data = read_sts(write(tmp_path / name, header + CELLS))
    assert data.to_list() == ROWS
    assert data.features["score"].dtype == "float64"


@pytest.mark.parametrize("names", [("a", "b"), ("sentence1", "sentence2")])
def test_jsonl_and_parquet_under_both_names(tmp_path: Path, names: tuple[str, str]):
    rows = [{names[0]: r["a"], names[1]: r["b"], "score": r["score"]} for r in ROWS]
    assert read_sts(write_jsonl(tmp_path / "s.jsonl", rows)).to_list() == ROWS
    assert read_sts(write_parquet(tmp_path / "s.parquet", rows)).to_list() == ROWS


def test_other_names_are_given_and_a_domain_is_read(tmp_path: Path):
    path = write(tmp_path / "s.csv", "left,sentence2,gold,domain\ny,z,3,news\n")
    data = read_sts(path, columns={"a": "left", "score": "gold"})
    assert data.to_list() == [{"a": "y", "b": "z", "score": 3.0, "domain": "news"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y,1\nx,y\n", "line 2: 2 cells; expected sentence, sentence, score"),
        ("x,y,1\nx,y,high\n", r"line 2: score must be a number, got str \('high'\)"),
        ("x,y,1\nx,y,inf\n", "line 2: score must be finite, got 'inf'"),
        ("x,y,1\nx,,1\n", "line 2: b is empty"),
        ("a,b,label\nx,y,1\n", r"line 2: column 'score' is missing; .*\['a', 'b', 'label'\]"),
        ("", r"s\.csv: no rows"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_sts(write(tmp_path / "s.csv", text))


def test_a_truth_value_is_no_score(tmp_path: Path):
    path = write_jsonl(tmp_path / "s.jsonl", [{"a": "x", "b": "y", "score": True}])
    with pytest.raises(ValueError, match=r"score must be a number, got bool \(True\)"):
        read_sts(path)
