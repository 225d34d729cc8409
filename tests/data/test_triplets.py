from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from moe_fast.data import read_triplets
from tests.data.files import write, write_jsonl

ROWS = [
    {"a": "q", "b": "p", "negative_2": "n2", "negative_1": "n1", "domain": "x", "id": 7},
    {"a": "r", "b": "s", "negative_2": "m2", "negative_1": "m1", "domain": "y", "id": 8},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_come_in_the_order_of_the_loss(tmp_path: Path, streaming: bool):
    path = write_jsonl(tmp_path / "t.jsonl", ROWS)
    data = read_triplets(path, keep=["id"], streaming=streaming)
    assert data.column_names == ["a", "b", "negative_1", "negative_2", "domain", "id"]
    assert list(data) == ROWS


def test_sentence_transformers_names_are_mapped(tmp_path: Path):
    path = write(tmp_path / "t.csv", "anchor,positive,negative\nq,p,n\n")
    columns = {"a": "anchor", "b": "positive", "negative_1": "negative"}
    assert read_triplets(path, columns=columns).to_list() == [
        {"a": "q", "b": "p", "negative_1": "n"}
    ]


def test_a_negative_given_to_another_is_no_longer_itself(tmp_path: Path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"a": "q", "b": "p", "negative_3": "n"}])
    data = read_triplets(path, columns={"negative_1": "negative_3"})
    assert data.to_list() == [{"a": "q", "b": "p", "negative_1": "n"}]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"a": "q", "b": "p"}', r"line 1: negatives must be numbered .* got \[\]; .*\['a', 'b'\]"),
        (
            '{"a": "q", "b": "p", "negative_1": "n", "negative_3": "m"}',
            r"line 1: negatives must be numbered .*; got \['negative_1', 'negative_3'\]",
        ),
        ('{"a": "q", "negative_1": "n"}', "line 1: column 'b' is missing"),
        ('{"a": "q", "b": "p", "negative_1": ""}', "line 1: negative_1 is empty"),
        ('{"a": "q", "b": "p", "negative_1": "p"}', "line 1: negative_1 is the same text as b"),
        (
            '{"a": "q", "b": "p", "negative_1": "n"}\n'
            '{"a": "q", "b": "p", "negative_1": "n", "negative_2": "m"}',
            "line 2: column 'negative_2', but the first row has 1 negatives",
        ),
        (
            '{"a": "q", "b": "p", "negative_1": "n", "negative_2": "m"}\n'
            '{"a": "q", "b": "p", "negative_1": "n"}',
            "line 2: column 'negative_2' is missing",
        ),
        ("", "no rows"),
    ],
)
def test_mistakes(tmp_path: Path, lines: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_triplets(write(tmp_path / "t.jsonl", lines))
