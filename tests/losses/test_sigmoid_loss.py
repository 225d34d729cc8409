"""SigmoidLoss: the function of the columns' embeddings, scale and bias learned."""

from __future__ import annotations

import math

import pytest
import torch
from loss_checks import assert_close
from toy_encoder import ANCHORS, HARD, POSITIVES, BagEncoder, column, embed

from moe_fast.losses import SigmoidLoss, functional


def batch(**extra) -> list[dict]:
    return [column(*texts, **extra) for texts in (ANCHORS, POSITIVES, *HARD)]


def test_is_the_function_of_the_embeddings_at_siglips_start():
    encoder = BagEncoder()
    a, b, *negatives = embed(encoder, *batch())
    rows = torch.stack([negatives[g][i] for i in range(3) for g in range(2)])  # i * G + g
    loss = SigmoidLoss(encoder).double()
    assert_close(loss(batch()), functional.sigmoid_loss(a, b, rows, scale=10.0, bias=-10.0), 1e-6)
    fixed = SigmoidLoss(encoder, learn_temperature=False, learn_bias=False)
    expected = functional.sigmoid_loss(a, b, rows, scale=10.0, bias=-10.0)
    assert_close(fixed(batch()), expected)
    assert set(dict(fixed.named_parameters())) == {"model.embedding"}


def test_scale_and_bias_have_the_exact_gradient():
    encoder = BagEncoder()
    columns = batch()[:2]
    loss = SigmoidLoss(encoder, temperature=0.25, bias=-1.0).double()
    loss(columns).backward()
    a, b = embed(encoder, *columns)

    def value(log_temperature: float, bias: float) -> float:
        scale = math.exp(-log_temperature)
        return functional.sigmoid_loss(a, b, scale=scale, bias=bias).item()

    at, bias, step = loss.log_temperature.item(), -1.0, 1e-5
    by_temperature = (value(at + step, bias) - value(at - step, bias)) / (2 * step)
    by_bias = (value(at, bias + step) - value(at, bias - step)) / (2 * step)
    assert loss.log_temperature.grad.item() == pytest.approx(by_temperature, rel=1e-7)
    assert loss.logit_bias.grad.item() == pytest.approx(by_bias, rel=1e-7)


def test_duplicates_domains_and_groups_reach_the_function():
    encoder = BagEncoder()
    columns = batch(domain_ids=[0, 1, 0], text_hash=[1, 2, 1])[:2]
    columns[1]["text_hash"] = torch.tensor([4, 5, 6])
    columns[0]["group_ids"] = torch.tensor([3, 3, 4])
    a, b = embed(encoder, *columns)
    kwargs = {
        "row_ids": columns[0]["text_hash"],
        "col_ids": columns[1]["text_hash"],
        "domain_ids": columns[0]["domain_ids"],
        "group_ids": columns[0]["group_ids"],
    }
    settings = {"learn_temperature": False, "learn_bias": False}
    loss = SigmoidLoss(encoder, negatives_from="same_domain", **settings)
    expected = functional.sigmoid_loss(a, b, scale=10.0, bias=-10.0, **kwargs)
    assert_close(loss(columns), expected)
    for dropped in kwargs:
        if dropped.endswith("_ids") and dropped not in ("row_ids", "col_ids"):
            other = functional.sigmoid_loss(
                a, b, scale=10.0, bias=-10.0, **kwargs | {dropped: None}
            )
            assert (other - expected).abs() > 1e-6
    assert "group_ids" not in encoder.seen[-1]


def test_metrics_config_and_citation():
    loss = SigmoidLoss(BagEncoder())
    loss(batch())
    assert set(loss.last_metrics) == {"in_batch_accuracy", "temperature", "logit_bias"}
    assert not any(value.requires_grad for value in loss.last_metrics.values())
    config = loss.get_config_dict()
    assert config["bias"] == -10.0
    assert SigmoidLoss(BagEncoder(), **config).get_config_dict() == pytest.approx(config)
    assert "2303.15343" in loss.citation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": math.nan}, "bias must be finite; got nan"),
        ({"negatives_from": "none"}, "negatives_from must be one of"),
        ({"temperature": 2.0}, "must start within"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SigmoidLoss(BagEncoder(), **settings)


def test_missing_domain_ids_are_named_before_anything_is_encoded():
    encoder = BagEncoder()
    with pytest.raises(ValueError, match="needs domain_ids in the features"):
        SigmoidLoss(encoder, negatives_from="same_domain")(batch())
    assert encoder.seen == []
