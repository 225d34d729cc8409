"""The experiment of three heads: what is measured, and that a killed training goes on as it was."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("sentence_transformers")

from experiments import three_heads
from moe_fast import add_three_heads
from tests.training.tiny_models import WORDS, make_dense

ROWS = 4


def tiny() -> three_heads.Training:
    torch.manual_seed(0)
    model = add_three_heads(make_dense(dropout=0.1), multi_vector_dim=8)
    words = [word for names in WORDS.values() for word in names]
    pairs = [(word, f"{word} {other}") for word, other in itertools.pairwise(words)]
    return three_heads.Training(model, pairs, ROWS, 1e-2, 0.6)


def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path):
    whole = tiny()
    whole.run(4)
    part = tiny()
    part.run(2)
    part.save(tmp_path / "state.pt", {"rows": ROWS})
    resumed = tiny()
    resumed.load(tmp_path / "state.pt", {"rows": ROWS})
    assert resumed.step == 2
    resumed.run(4)
    expected = whole.loss.state_dict()
    assert any("sparse_linear" in name for name in expected)
    for name, value in resumed.loss.state_dict().items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(SystemExit, match="other settings"):
        resumed.load(tmp_path / "state.pt", {"rows": 5})


def test_ndcg_is_that_of_ir_measures():
    from moe_fast.evaluation.ir_metrics import query_scores

    scores = np.random.default_rng(0).normal(size=(20, 30))
    own = list(range(5, 25))
    run = {str(q): {str(d): float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}
    qrels = {str(q): {str(d): 1} for q, d in enumerate(own)}
    found = three_heads.ndcg(scores, own)
    assert 0 < found.mean() < 1
    np.testing.assert_allclose(found, query_scores(run, qrels, ["nDCG@10"])["nDCG@10"])


def test_a_quarter_of_each_batch_is_of_the_second_set():
    first, second = [("a", str(i)) for i in range(5)], [("b", str(i)) for i in range(3)]
    pairs = three_heads.mixed(first, second, rows=8, steps=3)
    assert len(pairs) == 24
    for start in range(0, 24, 8):
        assert [side for side, _ in pairs[start : start + 8]] == ["a"] * 6 + ["b"] * 2
    assert [row for side, row in pairs if side == "b"] == ["0", "1", "2"] * 2
