"""MatryoshkaLoss: one encoding, the wrapped loss at every length."""

from __future__ import annotations

import pytest
import torch
from loss_checks import assert_close
from toy_encoder import ANCHORS, HARD, POSITIVES, BagEncoder, column, embed

from moe_fast import ops
from moe_fast.losses import (
    ContrastiveLearningPenaltyLoss,
    DistillationLoss,
    InfoNCELoss,
    MatryoshkaLoss,
    MultipleNegativesRankingPlusLoss,
    SigmoidLoss,
    functional,
)

REAL = ops.matryoshka_info_nce
COLUMNS = [column(*texts) for texts in (ANCHORS, POSITIVES, HARD[0])]


def test_is_the_weighted_sum_over_lengths():
    encoder = BagEncoder()
    a, b, n = embed(encoder, *COLUMNS)
    expected = {
        d: functional.info_nce(a[:, :d], b[:, :d], n[:, :d], scale=20.0, symmetric=False)
        for d in (2, 3, 6)
    }
    loss = MatryoshkaLoss(InfoNCELoss(encoder), [6, 2, 3], [1.0, 0.25, 0.5])
    assert_close(loss(COLUMNS), expected[6] + 0.25 * expected[2] + 0.5 * expected[3])
    for dim, value in expected.items():
        assert_close(loss.last_metrics[f"loss_{dim}"], value.detach())
    assert_close(MatryoshkaLoss(InfoNCELoss(encoder), [2, 3])(COLUMNS), expected[2] + expected[3])


def test_lengths_around_info_nce_are_one_pass(monkeypatch):
    """Around a subclass with a loss of its own they are not."""
    calls = []
    monkeypatch.setattr(
        ops, "matryoshka_info_nce", lambda **k: calls.append(k["dims"]) or REAL(**k)
    )
    encoder = BagEncoder()
    MatryoshkaLoss(InfoNCELoss(encoder), [6, 2, 3])(COLUMNS)
    assert calls == [[2, 3, 6]]
    MatryoshkaLoss(ContrastiveLearningPenaltyLoss(encoder), [6, 2])(COLUMNS[:2])
    assert len(calls) == 1


def test_encodes_once():
    encoder = BagEncoder()
    MatryoshkaLoss(InfoNCELoss(encoder), [1, 2, 4, 6])(COLUMNS)
    assert len(encoder.seen) == len(COLUMNS)


@pytest.mark.parametrize(
    "make",
    [
        lambda encoder: SigmoidLoss(encoder, learn_temperature=False, learn_bias=False),
        lambda encoder: MultipleNegativesRankingPlusLoss(encoder),
        lambda encoder: ContrastiveLearningPenaltyLoss(encoder, temperature=0.1),
    ],
)
def test_goes_around_any_loss(make):
    """Dot products are of the truncated embeddings as they are."""
    encoder = BagEncoder()
    columns = COLUMNS[:2]
    inner = make(encoder)
    embeddings = embed(encoder, *columns)
    expected = sum(
        inner.from_embeddings([e[:, :d] for e in embeddings], columns, None) for d in (3, 6)
    )
    assert_close(MatryoshkaLoss(inner, [3, 6])(columns), expected)


def test_the_metrics_are_those_of_the_largest_length():
    inner = InfoNCELoss(BagEncoder(), learn_temperature=True)
    loss = MatryoshkaLoss(inner, [6, 1])
    loss(COLUMNS).backward()
    one_length = InfoNCELoss(inner.model)
    one_length(COLUMNS)
    assert loss.last_metrics["in_batch_accuracy"] == one_length.last_metrics["in_batch_accuracy"]
    assert set(loss.last_metrics) == {"in_batch_accuracy", "temperature", "loss_1", "loss_6"}
    assert inner.log_temperature.grad.item() != 0.0


def test_labels_and_wrapped_wrappers():
    encoder = BagEncoder()
    labels = torch.tensor([[2.0, 1.0], [1.0, 0.0], [0.5, 0.4]], dtype=torch.float64)
    inner = DistillationLoss(InfoNCELoss(encoder))
    loss = MatryoshkaLoss(inner, [3])
    embeddings = [e[:, :3] for e in embed(encoder, *COLUMNS)]
    assert_close(loss(COLUMNS, labels), inner.from_embeddings(embeddings, COLUMNS, labels))
    assert "distillation" in loss.last_metrics
    assert loss.model is encoder
    assert loss.num_negatives(3) == 1


def test_config_and_citation():
    loss = MatryoshkaLoss(InfoNCELoss(BagEncoder()), [6, 3], [1.0, 0.5])
    assert loss.get_config_dict() == {
        "loss": "InfoNCELoss",
        "dims": [3, 6],
        "weights": [0.5, 1.0],
    }
    assert "2205.13147" in loss.citation


@pytest.mark.parametrize(
    ("dims", "weights", "error", "message"),
    [
        ([], None, ValueError, "dims must name at least one length"),
        ([3, 3], None, ValueError, r"none twice; got \[3, 3\]"),
        ([0], None, ValueError, "dims must be at least 1; got 0"),
        ([2.5], None, TypeError, "dims must be an int; got 2.5"),
        ([2, 3], [1.0], ValueError, "weights must be one per dim; got 1 for 2"),
        ([2], [-1.0], ValueError, "weights must be at least 0 and finite; got -1.0"),
    ],
)
def test_bad_settings_are_named(dims, weights, error, message):
    with pytest.raises(error, match=message):
        MatryoshkaLoss(InfoNCELoss(BagEncoder()), dims, weights)


def test_a_length_beyond_the_encoders_is_named():
    with pytest.raises(ValueError, match=r"at most the encoder's dimension, 6; got \[2, 7\]"):
        MatryoshkaLoss(InfoNCELoss(BagEncoder()), [2, 7])(COLUMNS)


def test_a_loss_in_one_piece_is_refused():
    with pytest.raises(TypeError, match="loss must be a loss of moe_fast .* got BagEncoder"):
        MatryoshkaLoss(BagEncoder(), [2])
