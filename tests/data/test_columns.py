"""Columns under the names that others give them: found, refused where two may be meant, named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value

from moe_fast.data import read_pairs, read_sts, read_training_data, read_triplets
from moe_fast.data.columns import match_columns, match_negatives, our_name
from tests.data.files import write, write_jsonl

PAIR = {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("column", "ours"),
    [
        ("anchor", "a"),
        ("Question", "a"),
        ("sentence1", "a"),
        ("sentence_A", "a"),
        ("document", "b"),
        (" text 2 ", "b"),
        ("negative", "negative_1"),
        ("neg", "negative_1"),
        ("Hard-Negative 12", "negative_12"),
        ("negative3", "negative_3"),
        ("labels", "label"),
        ("Domain", "domain"),
        ("negatives_", None),
        ("text", None),
        ("", None),
    ],
)
def test_a_spelling_has_one_meaning(column: str, ours: str | None):
    assert our_name(column) == ours


def test_a_given_name_goes_before_ours_and_ours_before_a_spelling():
    assert match_columns(["a", "anchor"], ["a"]) == {"a": "a"}
    assert match_columns(["a", "anchor", "b"], ["a", "b"], {"a": "anchor"}) == {
        "a": "anchor",
        "b": "b",
    }
    assert match_columns(["x"], ["a", "b"]) == {}
    assert match_columns(["query", "Answer"], ["a", "b"]) == {"a": "query", "b": "Answer"}


def test_two_columns_that_may_be_meant_are_an_error():
    with pytest.raises(ValueError, match=r"f: the columns \['query', 'question'\] may each .*'a'"):
        match_columns(["query", "question"], ["a", "b"], where="f")
    with pytest.raises(ValueError, match=r"\['neg', 'negative'\] may each be meant by 'negative_1"):
        match_negatives(["neg", "negative"])


def test_negatives_are_sorted_by_their_numbers():
    names = ["neg_10", "negative", "neg_2", "negative_1", "other"]
    assert match_negatives(names) == {
        "negative_1": "negative_1",
        "negative_2": "neg_2",
        "negative_10": "neg_10",
    }


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"anchor": "x", "positive": "y"}, PAIR),
        ({"query": "x", "document": "y"}, PAIR),
        ({"sentence1": "x", "sentence2": "y", "Labels": "1"}, {**PAIR, "label": 1}),
        ({"text1": "x", "text2": "y", "Domain": "law"}, {**PAIR, "domain": "law"}),
        ({"question": "x", "answer": "y", "negative": "n"}, {**PAIR, "negative_1": "n"}),
        (
            {"anchor": "x", "positive": "y", "neg_2": "m", "neg_1": "n"},
            {**PAIR, "negative_1": "n", "negative_2": "m"},
        ),
        ({**PAIR, "neg": ["n", "m"]}, {"query": "x", "pos": ["y"], "neg": ["n", "m"]}),
        (
            {"anchor": "x", "positive": ["y"], "negatives": ["n"]},
            {"query": "x", "pos": ["y"], "neg": ["n"]},
        ),
        ({"question": "x", "pos": ["y"]}, {"query": "x", "pos": ["y"], "neg": []}),
    ],
)
def test_other_names_are_understood(tmp_path: Path, row: dict, expected: dict, caplog):
    from_file = read_training_data(write_jsonl(tmp_path / "d.jsonl", [row, row]))
    from_dataset = read_training_data(Dataset.from_list([row, row]))
    assert from_file.to_list() == from_dataset.to_list() == [expected] * 2
    assert not caplog.messages


def test_what_is_not_read_is_named_once_with_what_it_is_close_to(tmp_path: Path, caplog):
    rows = [{**PAIR, "id": 1, "domian": "law"}, {**PAIR, "id": 2, "domian": "law", "late": 1}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    assert read_training_data(path).column_names == ["a", "b"]
    [said] = caplog.messages
    assert "not read: ['id', 'domian', 'late'] ('domian' is close to 'domain')" in said
    assert str(path) in said and "--columns" in said


def test_hard_negatives_that_pairs_leave_out_are_named(caplog):
    read_pairs(Dataset.from_list([{**PAIR, "neg": "n"}]))
    assert "'neg' is close to 'negative_1'" in caplog.text


def test_a_stream_names_them_at_once(tmp_path: Path, caplog):
    rows = [{**PAIR, "id": 1}, {**PAIR, "id": 2, "late": 1}]
    data = read_pairs(write_jsonl(tmp_path / "d.jsonl", rows), streaming=True)
    assert ["'id'" in said for said in caplog.messages] == [True]
    assert list(data) == [PAIR, PAIR]
    assert ["'id'" in said for said in caplog.messages] == [True, False]
    assert "['late']" in caplog.messages[1]


def test_control_characters_and_long_names_are_not_shown_as_they_are(tmp_path: Path, caplog):
    row = {**PAIR, "\x1b[2J": 1, "n" * 10**6: 1, **{f"c{n}": n for n in range(60_000)}}
    read_pairs(write_jsonl(tmp_path / "d.jsonl", [row]))
    [said] = caplog.messages
    assert said.isprintable() and len(said) < 2000 and "60,002 in all" in said


def test_sts_by_other_names(tmp_path: Path):
    path = write(tmp_path / "s.csv", "sentence_A;sentence_B;Similarity Score\nx;y;3,5\n")
    with pytest.raises(ValueError, match=r"line 2: score must be a number, got str \('3,5'\)"):
        read_sts(path)
    path = write(tmp_path / "t.csv", "sentence1;sentence2;score\nx;y;3.5\n")
    assert read_sts(path).to_list() == [{**PAIR, "score": 3.5}]


# --- labels and domains that carry their names ---------------------------------------------------


def _labelled(names: list[str], numbers: list[int], column: str = "label") -> Dataset:
    rows = [{"a": "x", "b": str(n), column: n} for n in numbers]
    kinds = {"a": Value("string"), "b": Value("string"), column: ClassLabel(names=names)}
    return Dataset.from_list(rows, features=Features(kinds))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["negative", "positive"], [0, 1]),
        (["positive", "negative"], [1, 0]),
        (["entailment", "not_entailment"], [1, 0]),
        (["Not-Duplicate", "duplicate"], [0, 1]),
        (["False", "True"], [0, 1]),
        (["1", "0"], [1, 0]),
    ],
)
def test_a_class_label_counts_by_its_name(tmp_path: Path, names: list[str], expected: list[int]):
    data = _labelled(names, [0, 1])
    assert list(read_pairs(data)["label"]) == expected
    data.to_parquet(tmp_path / "p.parquet")
    assert list(read_pairs(tmp_path / "p.parquet")["label"]) == expected
    data.save_to_disk(tmp_path / "saved")
    assert list(read_pairs(tmp_path / "saved")["label"]) == expected


def test_a_class_that_says_neither_is_an_error_with_its_place():
    nli = _labelled(["entailment", "neutral", "contradiction"], [0, 2, 1])
    with pytest.raises(ValueError, match="the dataset, row 3: label='neutral'; allowed are 0 and"):
        read_pairs(nli)
    assert len(read_pairs(nli, skip_invalid=True)) == 2


def test_a_class_label_of_minus_one_is_no_label():
    assert read_pairs(_labelled(["no", "yes"], [-1, -1])).column_names == ["a", "b"]


def test_domains_are_matched_by_name():
    data = read_pairs(_labelled(["medicine", "law"], [1, 0], column="Domain"))
    assert list(data["domain"]) == ["law", "medicine"]


@pytest.mark.parametrize(
    "values", [[1, 0], [True, False], [1.0, 0.0], ["1", "0"], ["true", "false"]]
)
def test_labels_of_every_type(tmp_path: Path, values: list):
    rows = [{**PAIR, "label": value} for value in values]
    assert list(read_pairs(write_jsonl(tmp_path / "p.jsonl", rows))["label"]) == [1, 0]
    assert list(read_pairs(Dataset.from_list(rows))["label"]) == [1, 0]


# --- datasets that are given ---------------------------------------------------------------------


def test_a_stream_of_the_callers():
    given = IterableDataset.from_generator(lambda: iter([{"anchor": "x", "positive": "y"}] * 2))
    assert list(read_pairs(given, streaming=True)) == [PAIR] * 2


def test_what_is_no_source():
    with pytest.raises(TypeError, match=r"with the splits \['test'\]; give one of them"):
        read_pairs(DatasetDict(test=Dataset.from_list([PAIR])))
    with pytest.raises(TypeError, match="source must be a path, .*; got list"):
        read_pairs([PAIR])
    with pytest.raises(ValueError, match="split='test', name=None: a dataset is one split already"):
        read_triplets(Dataset.from_list([PAIR]), split="test")


# --- rows that are skipped -----------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_rows_are_skipped_counted_and_listed(tmp_path: Path, streaming: bool, caplog):
    lines = '{"a": "", "b": "y"}\n{"a": \n{"a": "x", "b": "y"}\n' + '{"a": "x"}\n' * 12 + "[1]\n"
    data = read_pairs(write(tmp_path / "p.jsonl", lines), streaming=streaming, skip_invalid=True)
    assert list(data) == [PAIR]
    [said] = [said for said in caplog.messages if "skipped" in said]
    assert "15 invalid rows skipped, the first: line 1: a is empty; line 2: not valid JSON" in said
    assert "line 11: " in said and "line 12" not in said


def test_an_optional_column_that_is_null_in_some_rows(tmp_path: Path):
    rows = [{**PAIR, "domain": None}, {**PAIR, "domain": "law"}]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ValueError, match="line 2: .*in every row or in none, and null is not"):
        read_pairs(path)
    assert read_pairs(path, skip_invalid=True).to_list() == [{**PAIR, "domain": "law"}]
    nulls = write_jsonl(tmp_path / "n.jsonl", [{**PAIR, "domain": None, "label": None}] * 2)
    assert read_pairs(nulls).to_list() == [PAIR, PAIR]


def test_nothing_but_invalid_rows(tmp_path: Path, caplog):
    caplog.set_level(logging.ERROR)
    path = write(tmp_path / "p.csv", "a,b\n,y\nx,\n")
    with pytest.raises(ValueError, match="p.csv: 2 invalid rows skipped: line 2: a is empty; line"):
        read_pairs(path, skip_invalid=True)
