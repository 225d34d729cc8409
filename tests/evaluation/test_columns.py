from __future__ import annotations

import pytest

from moe_fast.evaluation.columns import read_columns


def test_what_is_wanted_is_taken_from_mappings_datasets_and_streams() -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"a": ["x", "y"], "b": ["u", "v"], "label": [0, 1], "other": [7, 8]}
    wanted = {name: columns[name] for name in ("a", "b", "label")}
    dataset = datasets.Dataset.from_dict(columns)
    for source in (columns, dataset, dataset.to_iterable_dataset()):
        assert read_columns(source, ("a", "b"), ("label", "domain")) == wanted


def test_columns_of_sentence_transformers_are_understood() -> None:
    source = {"anchor": ["x"], "positive": ["y"], "labels": [1]}
    found = read_columns(source, ("a", "b"), ("label", "domain"))
    assert found == {"a": ["x"], "b": ["y"], "label": [1]}
    sts = {"sentence1": ["x"], "sentence2": ["y"], "similarity_score": [2.5]}
    assert read_columns(sts, ("a", "b", "score")) == {"a": ["x"], "b": ["y"], "score": [2.5]}
    sts = {"sentence1": ["x"], "sentence2": ["y"], "score": [2.5], "label": [1]}
    assert read_columns(sts, ("a", "b", "score"))["score"] == [2.5]


@pytest.mark.parametrize("names", [["not_duplicate", "duplicate"], ["duplicate", "not_duplicate"]])
def test_classes_are_known_by_their_names(names: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "a": datasets.Value("string"),
            "b": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
        }
    )
    rows = {"a": ["x", "y"], "b": ["u", "v"], "label": ["duplicate", "not_duplicate"]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    for source in (dataset, dataset.to_iterable_dataset()):
        assert read_columns(source, ("a", "b"), ("label",))["label"] == [1, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"b": ["x"], "c": ["y"]}, r"column 'a' is missing; columns present: \['b', 'c'\]"),
        ({"a": [], "b": []}, "dataset has no rows"),
        ({"a": ["x"], "b": ["y", "z"]}, "one length; got {'a': 1, 'b': 2}"),
        ({"a": ["x", " "], "b": ["y", "z"]}, "dataset, row 1: a must be a text; got ' '"),
        ({"a": ["x"], "b": [None]}, "dataset, row 0: b must be a text; got None"),
        ({"a": ["x"], "b": ["y"], "domain": [3]}, "row 0: domain must be a text; got 3"),
    ],
)
def test_mistakes_are_named(columns: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_columns(columns, ("a", "b"), ("domain",))
    with pytest.raises(ValueError, match="^dev"):
        read_columns(columns, ("a", "b"), ("domain",), "dev")
