"""Batches that training meets rarely: both ways give what the op gives, or say what is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from toy_encoder import column

from moe_fast import ops
from moe_fast.losses import CachedLoss, InfoNCELoss

WAYS = {"plain": lambda loss: loss, "cached": lambda loss: CachedLoss(loss, tokens_per_chunk=3)}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
B = 5


class Table(nn.Module):
    """Row i is the embedding of token i: any embeddings, given by hand."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.clone())

    def forward(self, features):
        return {"sentence_embedding": self.rows[features["input_ids"][:, 0]]}


def columns(batch: int, number: int = 2) -> list[dict]:
    """Texts of one token each, no two alike: column c's row i is row ``c * batch + i``."""
    return [column(*([c * batch + i] for i in range(batch))) for c in range(number)]


def with_row(row: int, value: float) -> torch.Tensor:
    rows = torch.randn(2 * B, 4)
    rows[row] = value
    return rows


ODD = {
    "zero vectors": with_row(2, 0.0).index_fill(0, torch.tensor([B + 4]), 0.0),
    "only zero vectors": torch.zeros(2 * B, 4),
    "all alike": torch.ones(2 * B, 4),
    "d = 1": torch.randn(2 * B, 1),
    "d = 7": torch.randn(2 * B, 7),
    "very short": 1e-9 * torch.randn(2 * B, 4),
    "very long": 1e15 * torch.randn(2 * B, 4),
}


def assert_is_the_ops(way, rows: torch.Tensor, batch: int, features: list[dict], **arguments):
    """Value and gradient; no loss of 0, and no gradient that is not finite."""
    settings = {"negatives_from": "same_domain"} if "domain_ids" in arguments else {}
    loss = InfoNCELoss(Table(rows.double()), symmetric=True, temperature=0.5, **settings)
    value = way(loss)(features)
    value.backward()
    exact = rows.double().requires_grad_()
    a, b, *hard = exact.split(batch)
    negatives = torch.stack(hard, 1).flatten(0, 1) if hard else None
    expected = ops.info_nce(a, b, negatives, scale=2.0, backend="torch", **arguments)
    (grad,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    size = max(1.0, grad.abs().max().item())
    assert (loss.model.rows.grad - grad).abs().max() <= 1e-10 * size
    assert value > 0 and grad.isfinite().all()


@ways
@pytest.mark.parametrize("name", ODD)
def test_odd_embeddings(name, way):
    assert_is_the_ops(way, ODD[name], B, columns(B))


@ways
def test_a_batch_of_one_with_hard_negatives(way):
    assert_is_the_ops(way, torch.randn(4, 3), 1, columns(1, 4))


@ways
@pytest.mark.parametrize("domains", [[0, 0, 0, 0, 1], [0, 1, 1, 2, 2]])
def test_a_row_without_a_negative(domains, way):
    ids = torch.tensor(domains)
    features = [c | {"domain_ids": ids} for c in columns(B)]
    assert_is_the_ops(way, torch.randn(2 * B, 4), B, features, domain_ids=ids)


@ways
def test_every_row_without_a_negative(way):
    """Nothing to learn: 0, with a gradient of 0."""
    loss = InfoNCELoss(Table(torch.randn(2 * B, 4)), negatives_from="same_domain")
    value = way(loss)([c | {"domain_ids": torch.arange(B)} for c in columns(B)])
    value.backward()
    assert value == 0 and not loss.model.rows.grad.any()


@ways
@pytest.mark.parametrize("bound", [0.01, 1.0])
def test_a_temperature_at_its_bound(bound, way):
    rows = torch.randn(2 * B, 4, dtype=torch.float64)
    loss = InfoNCELoss(Table(rows), temperature=bound, learn_temperature=True).double()
    value = way(loss)(columns(B))
    value.backward()
    expected = ops.info_nce(*rows.split(B), scale=1 / bound, symmetric=False, backend="torch")
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)  # its logarithm was float32
    assert loss.log_temperature.grad.abs() > 0


@ways
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (with_row(3, math.nan), "a must be finite; row 3 holds NaN or infinity"),
        (with_row(B + 1, -math.inf), "b must be finite; row 1 holds NaN or infinity"),
        (with_row(4, 1e25), r"a must hold values up to 9.2e\+18, .*row 4 holds 1.0e\+25"),
    ],
)
def test_embeddings_that_cannot_be_used_are_named(rows, message, way):
    model = Table(rows)
    with pytest.raises(ValueError, match=message):
        way(InfoNCELoss(model))(columns(B))
    assert model.rows.grad is None
