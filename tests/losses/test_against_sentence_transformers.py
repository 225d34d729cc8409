"""InfoNCELoss is sentence-transformers' MultipleNegativesRankingLoss, values and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from tiny_models import features_of, make_dense, make_pairs

from moe_fast.losses import InfoNCELoss

SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def gradients(loss: torch.nn.Module, columns: list[list[str]]) -> tuple[float, dict]:
    loss.zero_grad()
    value = loss(features_of(loss.model, *columns), None)
    value.backward()
    grads = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    return value.item(), grads


@pytest.mark.parametrize("num_negatives", [0, 1, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [20.0, 5.0])
def test_values_and_gradients_are_those_of_mnrl(num_negatives, symmetric, scale):
    model = make_dense().double()
    pairs = make_pairs(7, negatives=num_negatives).remove_columns("domain")
    columns = [list(pairs[name]) for name in pairs.column_names]
    theirs = MultipleNegativesRankingLoss(model, scale=scale, **(SYMMETRIC if symmetric else {}))
    ours = InfoNCELoss(model, temperature=1 / scale, symmetric=symmetric)
    expected, expected_grads = gradients(theirs, columns)
    value, grads = gradients(ours, columns)
    assert value == pytest.approx(expected, rel=1e-12)
    assert set(grads) == set(expected_grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-12, msg=name)


def test_the_defaults_are_theirs():
    model = make_dense().double()
    pairs = make_pairs(6)
    columns = [list(pairs["anchor"]), list(pairs["positive"])]
    ours, theirs = InfoNCELoss(model), MultipleNegativesRankingLoss(model)
    assert gradients(ours, columns)[0] == pytest.approx(gradients(theirs, columns)[0], rel=1e-12)
    assert ours.scale == theirs.scale
    cached = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    assert gradients(cached, columns)[0] == pytest.approx(gradients(ours, columns)[0], rel=1e-12)


def test_a_repeated_question_is_masked_where_theirs_is_not():
    model = make_dense().double()
    columns = [["apple pear", "apple pear", "iron"], ["pear fig", "pear plum", "tin zinc"]]
    theirs = MultipleNegativesRankingLoss(model)
    expected = gradients(theirs, columns)[0]
    assert gradients(InfoNCELoss(model), columns)[0] < expected
    unmasked = InfoNCELoss(model, mask_duplicates=False)
    assert gradients(unmasked, columns)[0] == pytest.approx(expected, rel=1e-12)
