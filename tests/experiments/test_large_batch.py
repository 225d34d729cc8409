"""The experiment on a small made-up set: both runs see the same pairs, in the same order."""

import json

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("ir_measures")

from datasets import Dataset

from experiments.large_batch import Settings, in_order, run
from tests.experiments.test_medquad import data  # noqa: F401
from tests.training.tiny_models import make_dense

SETTINGS = Settings(
    train_pairs=24,
    large_batch=12,
    batch_size=4,
    large_steps=3,
    learning_rate=2e-3,
    large_rate=4e-3,
    tokens_per_chunk=40,
    questions=12,
    answers=18,
    tokens=16,
)


def test_no_large_batch_holds_a_pair_twice():
    seen = in_order(Dataset.from_dict({"a": list(range(24))}), SETTINGS)["a"]
    assert len(seen) == 36
    batches = [list(seen[i : i + 12]) for i in range(0, 36, 12)]
    assert all(len(set(batch)) == 12 for batch in batches)
    assert sorted(batches[0] + batches[1]) == list(range(24))
    assert batches[2] != batches[0]


def test_batches_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="train_pairs must be a multiple of large_batch"):
        Settings(train_pairs=5000)


def test_the_whole_way(data, tmp_path):  # noqa: F811
    model = tmp_path / "model"
    make_dense().save_pretrained(str(model))
    systems = run(data, model, tmp_path / "results", SETTINGS)
    written = json.loads((tmp_path / "results" / "large_batch.json").read_text())
    assert list(written["systems"]) == list(systems) == ["pretrained", "batch 4", "batch 12"]
    assert [len(row["history"]) for row in written["systems"].values()] == [0, 9, 3]
    assert [len(found) for found in written["differences"].values()] == [2, 2]
    small, large = (written["systems"][f"batch {n}"]["history"] for n in (4, 12))
    assert large[-1]["loss"] < large[0]["loss"] and small[-1]["loss"] < small[0]["loss"]
    text = (tmp_path / "results" / "large_batch.md").read_text()
    assert "| batch 12 - batch 4" in text and "36 pairs seen" in text
