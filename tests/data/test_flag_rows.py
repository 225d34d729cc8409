from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from moe_fast.data import read_flag_rows
from tests.data.files import write_jsonl, write_parquet

FULL = {
    "query": "q",
    "pos": ["p1", "p2"],
    "neg": ["n1", "n2", "n3"],
    "neg_q": ["q1", "q2", "q3"],
    "pos_scores": [1.0, 0.25],
    "neg_scores": [-1.5, 0.0, 2.0],
    "domain": "x",
}
LISTS = {"query": "q", "pos": ["p"], "neg": ["n"]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.parquet"])
def test_all_columns_are_read_and_others_left_out(tmp_path: Path, name: str, streaming: bool):
    rows = [{**FULL, "prompt": "p"}, {**FULL, "pos": ["p3", "p4"], "prompt": "p"}]
    write = write_parquet if name.endswith("parquet") else write_jsonl
    data = read_flag_rows(write(tmp_path / name, rows), streaming=streaming)
    assert list(data) == [FULL, {**FULL, "pos": ["p3", "p4"]}]
    assert data.features["pos"].feature.dtype == "string"
    assert data.features["neg_scores"].feature.dtype == "float64"


def test_lists_may_differ_in_length_and_negatives_be_absent(tmp_path: Path):
    rows = [{"query": "q", "pos": ["p"]}, {"query": "r", "pos": ["p", "s"], "neg": ["n"] * 3}]
    data = read_flag_rows(write_jsonl(tmp_path / "f.jsonl", rows))
    assert data.to_list() == [{**rows[0], "neg": []}, rows[1]]


def test_whole_numbers_are_scores(tmp_path: Path):
    rows = [{**LISTS, "pos_scores": [1], "neg_scores": [0.5]}]
    assert read_flag_rows(write_jsonl(tmp_path / "f.jsonl", rows))[0]["pos_scores"] == [1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos": []}, "line 1: pos is an empty list"),
        ({"pos": 3}, r"line 1: pos must be a list, got int \(3\)"),
        ({"neg": ["n", " "]}, r"line 1: neg\[1\] is empty"),
        ({"neg": ["n", 3]}, r"line 1: neg\[1\] must be a string, got int"),
        ({"query": ""}, "line 1: query is empty"),
        ({"neg_q": ["a", "b"]}, "line 1: neg_q has 2 entries for 1 of neg"),
        (
            {"pos_scores": [], "neg_scores": [1.0]},
            "line 1: pos_scores has 0 entries for 1 of pos",
        ),
        (
            {"pos_scores": [1.0], "neg_scores": [1.0, 2.0]},
            "line 1: neg_scores has 2 entries for 1 of neg",
        ),
        ({"pos_scores": [1.0]}, "line 1: pos_scores and neg_scores must be given together"),
        ({"neg_scores": [1.0]}, "line 1: pos_scores and neg_scores must be given together"),
        (
            {"pos_scores": [float("nan")], "neg_scores": [1.0]},
            r"line 1: pos_scores\[0\] must be finite, got nan",
        ),
        (
            {"pos_scores": ["high"], "neg_scores": [1.0]},
            r"line 1: pos_scores\[0\] must be a number, got str \('high'\)",
        ),
        ({"neg": ["n", "p"]}, "line 1: a text is in pos and in neg: 'p'"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        read_flag_rows(write_jsonl(tmp_path / "f.jsonl", [{**LISTS, **changes}]))


def test_a_missing_list_is_named(tmp_path: Path):
    path = write_jsonl(tmp_path / "f.jsonl", [{"query": "q", "neg": ["n"]}])
    with pytest.raises(ValueError, match=r"column 'pos' is missing; .*\['neg', 'query'\]"):
        read_flag_rows(path)
