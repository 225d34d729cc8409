"""MultipleNegativesRankingPlusLoss: the function of two columns' embeddings, with a temperature."""

from __future__ import annotations

import math

import pytest
from loss_checks import assert_close
from toy_encoder import ANCHORS, POSITIVES, BagEncoder, column, embed

from moe_fast.losses import InfoNCELoss, MultipleNegativesRankingPlusLoss, functional

COLUMNS = [column(*ANCHORS), column(*POSITIVES)]


def test_is_the_function_of_the_embeddings():
    encoder = BagEncoder()
    a, b = embed(encoder, *COLUMNS)
    loss = MultipleNegativesRankingPlusLoss(encoder)
    assert_close(loss(COLUMNS), functional.mnr_plus(a, b))
    older = MultipleNegativesRankingPlusLoss(encoder, temperature=0.5)
    assert_close(older(COLUMNS), functional.mnr_plus(a, b, scale=2.0))
    assert set(loss.last_metrics) == {"in_batch_accuracy", "own_targets"}


def test_cosine_is_the_symmetric_info_nce_here():
    encoder = BagEncoder()
    ours = MultipleNegativesRankingPlusLoss(encoder, temperature=0.05, similarity="cosine")
    theirs = InfoNCELoss(encoder, temperature=0.05, symmetric=True)
    assert_close(ours(COLUMNS), theirs(COLUMNS))
    assert ours.last_metrics["own_targets"].item() == 1.0


def test_a_lone_pair_is_said(caplog):
    loss = MultipleNegativesRankingPlusLoss(BagEncoder())
    assert loss([column([1]), column([2])]).item() == 0.0
    assert "nothing to learn from" in caplog.text


def test_the_older_forms_temperature_is_learned():
    loss = MultipleNegativesRankingPlusLoss(
        BagEncoder(), temperature=2.0, learn_temperature=True
    ).double()
    loss(COLUMNS).backward()
    a, b = embed(loss.model, *COLUMNS)

    def value(log_temperature: float) -> float:
        return functional.mnr_plus(a, b, scale=math.exp(-log_temperature)).item()

    at, step = math.log(2.0), 1e-5
    numeric = (value(at + step) - value(at - step)) / (2 * step)
    assert loss.log_temperature.grad.item() == pytest.approx(numeric, rel=1e-6)
    assert loss.last_metrics["temperature"].item() == pytest.approx(2.0)


def test_config_and_citation_are_for_the_model_card():
    config = MultipleNegativesRankingPlusLoss(BagEncoder(), temperature=3.0).get_config_dict()
    assert config["temperature"] == 3.0
    again = MultipleNegativesRankingPlusLoss(BagEncoder(), **config)
    assert again.get_config_dict() == config
    assert "2401.15713" in again.citation


@pytest.mark.parametrize("number", [1, 3])
def test_it_takes_two_columns(number):
    encoder = BagEncoder()
    with pytest.raises(ValueError, match=f"needs two text columns .* got {number}"):
        MultipleNegativesRankingPlusLoss(encoder)(COLUMNS[:1] * number)
    assert encoder.seen == []
