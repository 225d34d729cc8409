"""contrastive_learning_penalty: pairs, row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import assert_close, assert_same, property_test, randn

from moe_fast.losses.functional import contrastive_learning_penalty


def oracle(negatives, queries) -> torch.Tensor:
    pairs = list(zip(negatives, queries, strict=True))
    return sum(1 - (h @ q) / (h @ h).sqrt() / (q @ q).sqrt() for h, q in pairs) / len(pairs)


@property_test
@given(rows=st.integers(1, 7), dim=st.integers(2, 9), seed=st.integers(0, 999))
def test_is_the_definition(rows, dim, seed):
    negatives, queries = randn(rows, dim, seed=seed), randn(rows, dim, seed=seed + 1000)
    assert_same(
        lambda: contrastive_learning_penalty(negatives, queries),
        lambda: oracle(negatives, queries),
        negatives,
        queries,
    )


def test_gradcheck():
    torch.autograd.gradcheck(contrastive_learning_penalty, (randn(3, 4), randn(3, 4, seed=1)))


def published(negatives: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The published code's: negatives [B, G, d] and queries [B * G, d], paired by broadcasting."""
    return (1 - F.cosine_similarity(negatives, queries, dim=-1)).mean()


def test_the_published_pairing_is_right_for_one_row_only():
    """With one negative each it averages over all B x B combinations; with two it fails."""
    negatives = randn(4, 6)
    queries = negatives + 0.1 * randn(4, 6, seed=1)  # each close to its own negative
    ours = contrastive_learning_penalty(negatives, queries)
    assert_close(ours, oracle(negatives, queries))
    assert_close(ours, published(negatives[None], queries))
    one_each = published(negatives[:, None], queries)
    combinations = [oracle(n[None], q[None]) for n in negatives for q in queries]
    assert_close(one_each, sum(combinations) / 16)
    assert ours < 0.05
    assert one_each > 0.5
    with pytest.raises(RuntimeError, match="must match the size"):
        published(negatives.view(2, 2, 6), queries)


def test_opposite_and_equal_directions():
    x = randn(3, 5)
    assert contrastive_learning_penalty(x, 7 * x).item() == pytest.approx(0.0, abs=1e-15)
    assert contrastive_learning_penalty(x, -x).item() == pytest.approx(2.0)


def test_low_precision_inputs_are_computed_in_float32():
    h, q = randn(5, 8, dtype=torch.bfloat16), randn(5, 8, seed=1, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = contrastive_learning_penalty(h, q)
    assert penalty.dtype == torch.float32
    assert_close(penalty, oracle(h.double(), q.double()), 1e-6)


@pytest.mark.parametrize(
    ("negatives", "queries", "error", "message"),
    [
        (randn(2, 3), randn(4, 3), ValueError, r"queries must have shape .*\[2, 3\]; got \[4, 3\]"),
        (randn(2, 3, 1), randn(2, 3, 1), ValueError, r"negatives must have shape \[P, d\]"),
        (randn(0, 3), randn(0, 3), ValueError, "negatives must hold at least one row"),
        (randn(2, 3), randn(2, 3, dtype=torch.float32), TypeError, "queries must have the dtype"),
    ],
)
def test_bad_input_is_named(negatives, queries, error, message):
    with pytest.raises(error, match=message):
        contrastive_learning_penalty(negatives, queries)
