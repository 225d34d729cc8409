"""bench.embedding_quality: differences of nDCG@10 to float32, with paired intervals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("ir_measures", reason="needs the extra moe-fast[eval]")
pytest.importorskip("scipy", reason="needs the extra moe-fast[eval]")

from bench.embedding_quality import METRIC, quality, retrieval_of


def test_a_repeated_question_has_all_its_answers():
    found = retrieval_of([("q", "x"), ("r", "y"), ("q", "z")])
    assert found.corpus == {"a0": "x", "a1": "y", "a2": "z"}
    assert found.queries == {"q0": "q", "q1": "r"}
    assert found.qrels == {"q0": {"a0": 1, "a2": 1}, "q1": {"a1": 1}}


def test_the_same_vectors_cost_nothing_and_wrong_ones_do():
    pairs = [(f"q{i}", f"a{i}") for i in range(40)]
    exact = (torch.eye(40), torch.eye(40))
    wrong = (torch.eye(40), torch.eye(40).roll(1, 0))
    found = quality(pairs, exact, {"same": exact, "wrong": wrong})
    difference = f"{METRIC} less float32's"
    assert found["same"] == {METRIC: 1.0, difference: 0.0, "from": 0.0, "to": 0.0}
    assert found["wrong"][difference] < -0.5
    assert found["wrong"]["from"] <= found["wrong"][difference] <= found["wrong"]["to"] < 0
