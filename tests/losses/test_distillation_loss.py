"""DistillationLoss: a teacher's scores for each row's own candidates, alone or beside a loss."""

from __future__ import annotations

import math

import pytest
import torch
from loss_checks import F64, assert_close
from toy_encoder import ANCHORS, HARD, POSITIVES, BagEncoder, column, embed

from moe_fast.losses import ContrastiveLearningPenaltyLoss, DistillationLoss, InfoNCELoss

COLUMNS = [column(*texts) for texts in (ANCHORS, POSITIVES, *HARD)]
SCORES = torch.tensor([[3.0, 1.0, 0.5], [0.2, 0.1, -4.0], [1.0, 1.0, 1.0]], dtype=F64)


def oracle(encoder, temperature, teacher_temperature, similarity, columns=COLUMNS) -> torch.Tensor:
    a, *candidates = embed(encoder, *columns[:4])
    total = 0
    for i in range(3):
        logits = []
        for c in candidates:
            dot = a[i] @ c[i]
            cosine = dot / (a[i] @ a[i]).sqrt() / (c[i] @ c[i]).sqrt()
            logits.append((cosine if similarity == "cosine" else dot) / temperature)
        p = (SCORES[i] / teacher_temperature).softmax(0)
        q = torch.stack(logits).softmax(0)
        total = total + sum(p[c] * (p[c] / q[c]).log() for c in range(3))
    return total / 3


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(0.05, 1.0), (0.7, 0.3)])
def test_is_the_definition(similarity, temperature, teacher_temperature):
    encoder = BagEncoder()
    loss = DistillationLoss(
        encoder,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        similarity=similarity,
        coefficient=0.5,
    )
    value = loss(COLUMNS, SCORES)
    expected = oracle(encoder, temperature, teacher_temperature, similarity)
    assert_close(value, 0.5 * expected)
    assert_close(loss.last_metrics["distillation"], expected.detach())
    ours, theirs = (torch.autograd.grad(v, encoder.embedding)[0] for v in (value, 0.5 * expected))
    assert_close(ours, theirs)


def test_beside_a_contrastive_loss_of_one_encoding():
    encoder = BagEncoder()
    loss = DistillationLoss(InfoNCELoss(encoder), coefficient=2.0)
    total = loss(COLUMNS, SCORES)
    assert len(encoder.seen) == len(COLUMNS)
    expected = InfoNCELoss(encoder)(COLUMNS) + 2.0 * oracle(encoder, 0.05, 1.0, "cosine")
    assert_close(total, expected)
    assert set(loss.last_metrics) == {"in_batch_accuracy", "distillation"}
    assert loss.model is encoder


def test_queries_of_the_negatives_are_no_candidates():
    encoder = BagEncoder()
    columns = [*COLUMNS, column([31], [32], [33]), column([34], [35], [36])]
    inner = ContrastiveLearningPenaltyLoss(encoder, queries_per_negative=1)
    total = DistillationLoss(inner)(columns, SCORES)
    assert_close(total, inner(columns) + oracle(encoder, 0.05, 1.0, "cosine"))


def test_each_has_its_own_learned_temperature():
    loss = DistillationLoss(
        InfoNCELoss(BagEncoder(), learn_temperature=True), learn_temperature=True
    ).double()
    loss(COLUMNS, SCORES).backward()
    own = {n: p.grad.item() for n, p in loss.named_parameters() if "temperature" in n}
    assert set(own) == {"log_temperature", "loss.log_temperature"}
    assert all(own.values())
    assert {"temperature", "distillation_temperature"} <= set(loss.last_metrics)


def test_config_and_citation():
    loss = DistillationLoss(BagEncoder(), teacher_temperature=2.0)
    config = loss.get_config_dict()
    assert config["teacher_temperature"] == 2.0
    assert config["loss"] is None
    assert DistillationLoss(InfoNCELoss(BagEncoder())).get_config_dict()["loss"] == "InfoNCELoss"
    assert "2010.11386" in loss.citation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficient": -1.0}, "coefficient must be at least 0 and finite; got -1.0"),
        ({"coefficient": math.nan}, "coefficient must be at least 0 and finite; got nan"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be a positive, finite number"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(BagEncoder(), **settings)


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        (COLUMNS[:2], SCORES, "needs at least three text columns"),
        (COLUMNS, None, r"labels must be float teacher scores \[B, 1 \+ G\]; got NoneType"),
        (COLUMNS, SCORES.long(), "got torch.int64"),
        (COLUMNS, SCORES[:, :2], r"labels must be \[B, 3\], .* 2 hard negatives; got \[3, 2\]"),
        (COLUMNS, SCORES[:, 0], r"labels must be \[B, 3\]"),
    ],
)
def test_bad_batches_are_named_before_anything_is_encoded(columns, labels, message):
    encoder = BagEncoder()
    with pytest.raises(ValueError, match=message):
        DistillationLoss(encoder)(columns, labels)
    assert encoder.seen == []


def test_scores_that_are_missing_are_named():
    scores = SCORES.clone()
    scores[1, 2] = math.nan
    with pytest.raises(ValueError, match="teacher_logits must be finite; .* in row 1"):
        DistillationLoss(BagEncoder())(COLUMNS, scores)
