"""ContrastiveLearningPenaltyLoss: its columns, and (1 - l) InfoNCE + l penalty."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import assert_close, assert_same, property_test, randn
from toy_encoder import ANCHORS, HARD, POSITIVES, BagEncoder, column

from moe_fast.losses import ContrastiveLearningPenaltyLoss, InfoNCELoss

QUERIES = [[[21], [22, 23], [24]], [[25, 26], [27], [28]]]


def cosine(x, y) -> torch.Tensor:
    return (x @ y) / (x @ x).sqrt() / (y @ y).sqrt()


def oracle(a, b, negatives, queries, weight, temperature) -> torch.Tensor:
    """Loops; ``negatives[g][i]``, ``queries[g][m][i]``."""
    rows = range(len(a))
    contrastive = 0
    for i in rows:
        candidates = [b[j] for j in rows] + [n[j] for n in negatives for j in rows]
        logits = torch.stack([cosine(a[i], c) / temperature for c in candidates])
        contrastive = contrastive - logits.log_softmax(0)[i] / len(a)
    if negatives:
        pairs = [
            (n[i], q[i]) for n, qs in zip(negatives, queries, strict=True) for q in qs for i in rows
        ]
    else:
        pairs = [(b[i], a[i]) for i in rows]
    penalty = sum(1 - cosine(h, q) for h, q in pairs) / len(pairs)
    return (1 - weight) * contrastive + weight * penalty


@property_test
@given(
    rows=st.integers(2, 5),
    num_negatives=st.integers(0, 3),
    per_negative=st.integers(1, 2),
    weight=st.sampled_from([0.1, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_is_the_definition(rows, num_negatives, per_negative, weight, seed):
    """Any batch size, any number of negatives and of queries for each."""
    count = 2 + num_negatives * (1 + per_negative)
    leaves = [randn(rows, 5, seed=seed + 1000 * c) for c in range(count)]
    a, b, *rest = leaves
    negatives, flat = rest[:num_negatives], rest[num_negatives:]
    queries = [flat[g * per_negative :][:per_negative] for g in range(num_negatives)]
    loss = ContrastiveLearningPenaltyLoss(
        BagEncoder(),
        queries_per_negative=per_negative,
        penalty_weight=weight,
        temperature=0.5,
        mask_duplicates=False,
    )
    assert_same(
        lambda: loss.from_embeddings(leaves, [{}] * count, None),
        lambda: oracle(a, b, negatives, queries, weight, 0.5),
        *leaves,
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_query_columns_are_no_negatives(symmetric):
    encoder = BagEncoder()
    columns = [column(*texts) for texts in (ANCHORS, POSITIVES, *HARD, *QUERIES)]
    loss = ContrastiveLearningPenaltyLoss(encoder, queries_per_negative=1, symmetric=symmetric)
    total = loss(columns)
    contrastive = InfoNCELoss(encoder, temperature=0.02, symmetric=symmetric)(columns[:4])
    vectors = [encoder(c)["sentence_embedding"] for c in columns]
    pairs = [(vectors[2 + g][i], vectors[4 + g][i]) for g in range(2) for i in range(3)]
    penalty = sum(1 - cosine(h, q) for h, q in pairs) / 6
    assert_close(total, 0.9 * contrastive + 0.1 * penalty)
    assert_close(loss.last_metrics["info_nce"], contrastive.detach())
    assert_close(loss.last_metrics["penalty"], penalty.detach())
    assert "in_batch_accuracy" in loss.last_metrics
    assert loss.num_negatives(6) == 2


def test_without_queries_the_in_batch_pairs_are_penalised():
    encoder = BagEncoder()
    columns = [column(*ANCHORS), column(*POSITIVES)]
    a, b = (encoder(c)["sentence_embedding"] for c in columns)
    expected = 0.8 * InfoNCELoss(encoder, temperature=0.02)(columns) + 0.2 * (
        sum(1 - cosine(b[j], a[j]) for j in range(3)) / 3
    )
    loss = ContrastiveLearningPenaltyLoss(encoder, penalty_weight=0.2)
    assert_close(loss(columns), expected)
    with_negatives = ContrastiveLearningPenaltyLoss(encoder, queries_per_negative=0)
    with_negatives([*columns, column(*HARD[0]), column(*HARD[1])])
    assert_close(with_negatives.last_metrics["penalty"], loss.last_metrics["penalty"])


def test_of_a_lone_pair_the_penalty_is_left():
    loss = ContrastiveLearningPenaltyLoss(BagEncoder(), penalty_weight=0.2)
    total = loss([column([1]), column([2])])
    assert loss.last_metrics["info_nce"].item() == 0.0
    assert_close(total.detach(), 0.2 * loss.last_metrics["penalty"])


def test_one_row_with_a_negative_and_its_query():
    loss = ContrastiveLearningPenaltyLoss(BagEncoder(), queries_per_negative=1)
    loss([column([1]), column([2]), column([3]), column([3])]).backward()
    assert loss.last_metrics["penalty"].item() == pytest.approx(0.0, abs=1e-12)


def test_the_penalty_pulls_on_negative_and_query():
    leaves = [randn(2, 4, seed=s) for s in range(4)]
    loss = ContrastiveLearningPenaltyLoss(
        BagEncoder(), queries_per_negative=1, penalty_weight=1.0, mask_duplicates=False
    )
    loss.from_embeddings(leaves, [{}] * 4, None).backward()
    assert leaves[2].grad.abs().min() > 0
    assert leaves[3].grad.abs().min() > 0


def test_learned_temperature_and_config():
    loss = ContrastiveLearningPenaltyLoss(BagEncoder(), learn_temperature=True).double()
    loss([column(*ANCHORS), column(*POSITIVES)]).backward()
    assert loss.log_temperature.grad.item() != 0.0
    config = loss.get_config_dict()
    assert config["penalty_weight"] == 0.1
    assert config["temperature"] == pytest.approx(0.02)
    again = ContrastiveLearningPenaltyLoss(BagEncoder(), **config)
    assert again.get_config_dict() == pytest.approx(config)
    assert "2412.17364" in loss.citation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries_per_negative": -1}, "queries_per_negative must be at least 0"),
        ({"penalty_weight": 1.5}, r"penalty_weight must lie in \[0, 1\]; got 1.5"),
        ({"temperature": 0.0}, "temperature must be a positive"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveLearningPenaltyLoss(BagEncoder(), **settings)


@pytest.mark.parametrize(
    ("number", "queries", "message"),
    [
        (1, 1, "needs at least two text columns"),
        (4, None, r"queries_per_negative must be given .* got 2 of them and None"),
        (3, 1, r"queries_per_negative=1 needs a multiple of 2 columns .* got 1"),
        (6, 2, r"queries_per_negative=2 needs a multiple of 3 columns .* got 4"),
    ],
)
def test_columns_that_do_not_fit_are_named_before_anything_is_encoded(number, queries, message):
    encoder = BagEncoder()
    loss = ContrastiveLearningPenaltyLoss(encoder, queries_per_negative=queries)
    with pytest.raises(ValueError, match=message):
        loss([column([1], [2])] * number)
    assert encoder.seen == []
