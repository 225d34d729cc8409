"""Where sentence-transformers computes the same: values and gradients are the same."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    DistillKLDivLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss as TheirMatryoshkaLoss
from sentence_transformers.util import pairwise_cos_sim, pairwise_dot_score
from tiny_models import features_of, make_dense, make_pairs

from moe_fast.losses import DistillationLoss, InfoNCELoss, MatryoshkaLoss

SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def gradients(
    loss: torch.nn.Module, columns: list[list[str]], labels: torch.Tensor | None = None
) -> tuple[float, dict]:
    loss.zero_grad()
    value = loss(features_of(loss.model, *columns), labels)
    value.backward()
    grads = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    return value.item(), {name.removeprefix("loss."): grad for name, grad in grads.items()}


def assert_same(ours, theirs, columns, labels=None) -> None:
    """Values and the gradients of every parameter of the encoder."""
    expected, expected_grads = gradients(theirs, columns, labels)
    value, grads = gradients(ours, columns, labels)
    assert value == pytest.approx(expected, rel=1e-12)
    assert set(grads) == set(expected_grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("num_negatives", [0, 1, 3])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [20.0, 5.0])
def test_values_and_gradients_are_those_of_mnrl(num_negatives, symmetric, scale):
    model = make_dense().double()
    pairs = make_pairs(7, negatives=num_negatives).remove_columns("domain")
    columns = [list(pairs[name]) for name in pairs.column_names]
    theirs = MultipleNegativesRankingLoss(model, scale=scale, **(SYMMETRIC if symmetric else {}))
    ours = InfoNCELoss(model, temperature=1 / scale, symmetric=symmetric)
    assert_same(ours, theirs, columns)


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


@pytest.mark.parametrize("num_negatives", [0, 2])
def test_matryoshka_is_theirs_around_their_loss(num_negatives):
    model = make_dense().double()
    pairs = make_pairs(6, negatives=num_negatives).remove_columns("domain")
    columns = [list(pairs[name]) for name in pairs.column_names]
    dims, weights = [16, 8, 5], [1.0, 0.5, 0.3]
    theirs = TheirMatryoshkaLoss(model, MultipleNegativesRankingLoss(model), dims, weights)
    assert_same(MatryoshkaLoss(InfoNCELoss(model), dims, weights), theirs, columns)


@pytest.mark.parametrize(
    ("similarity", "similarity_fct"), [("dot", pairwise_dot_score), ("cosine", pairwise_cos_sim)]
)
@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("num_negatives", [1, 3])
def test_distillation_is_theirs(
    similarity, similarity_fct, temperature, teacher_temperature, num_negatives
):
    """Theirs multiplies by the student's temperature squared."""
    model = make_dense().double()
    pairs = make_pairs(5, negatives=num_negatives).remove_columns("domain")
    columns = [list(pairs[name]) for name in pairs.column_names]
    scores = torch.randn(5, 1 + num_negatives, dtype=torch.float64)
    theirs = DistillKLDivLoss(
        model,
        similarity_fct,
        student_temperature=temperature,
        teacher_temperature=teacher_temperature,
    )
    ours = DistillationLoss(
        model,
        coefficient=temperature**2,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        similarity=similarity,
    )
    assert_same(ours, theirs, columns, scores)


def test_matryoshka_around_distillation_is_theirs():
    model = make_dense().double()
    pairs = make_pairs(5, negatives=2).remove_columns("domain")
    columns = [list(pairs[name]) for name in pairs.column_names]
    scores = torch.randn(5, 3, dtype=torch.float64)
    theirs = TheirMatryoshkaLoss(model, DistillKLDivLoss(model, pairwise_cos_sim), [16, 4])
    ours = MatryoshkaLoss(DistillationLoss(model, temperature=1.0), [16, 4])
    assert_same(ours, theirs, columns, scores)
