from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from moe_fast.data import read_training_data
from tests.data.files import write_jsonl

PAIR = {"a": "x", "b": "y"}
TRIPLET = {**PAIR, "negative_1": "n"}
FLAG = {"query": "q", "pos": ["p"], "neg": ["n"]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("row", [PAIR, TRIPLET, FLAG])
def test_the_columns_tell_the_layout(tmp_path: Path, row: dict, streaming: bool):
    path = write_jsonl(tmp_path / "d.jsonl", [{**row, "more": 1}, {**row, "more": 2}])
    data = read_training_data(path, streaming=streaming, keep=["more"])
    assert list(data) == [{**row, "more": 1}, {**row, "more": 2}]


def test_renamed_columns_count(tmp_path: Path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "x", "answer": "y", "wrong": "n"}])
    columns = {"a": "question", "b": "answer"}
    assert read_training_data(path, columns=columns).to_list() == [PAIR]
    columns["negative_1"] = "wrong"
    assert read_training_data(path, columns=columns).to_list() == [TRIPLET]


def test_no_known_layout_lists_what_there_is(tmp_path: Path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"title": "x", "answer": "y"}])
    with pytest.raises(ValueError, match=r"line 1: columns must be a and b .*\['answer', 'title"):
        read_training_data(path)
    with pytest.raises(ValueError, match="no rows"):
        read_training_data(write_jsonl(tmp_path / "e.jsonl", []))
