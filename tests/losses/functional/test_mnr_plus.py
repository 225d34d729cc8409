"""mnr_plus against loops over the rows, written from its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from loss_checks import F64, assert_close, assert_same, property_test, randn

from moe_fast.losses.functional import info_nce, mnr_plus, row_blocks


def log_sum_exp(values: list[torch.Tensor]) -> torch.Tensor:
    largest = max(v.item() for v in values)
    return largest + torch.log(sum(torch.exp(v - largest) for v in values))


def targets(a, b, t: float) -> tuple[list[int], list[int]]:
    """The row that each row, and that each column, is to find."""
    rows = range(len(a))
    s = [[t * (a[i] @ a[j] + b[i] @ b[j]).item() / 2 for j in rows] for i in rows]
    of_row = [max(rows, key=lambda j, i=i: s[i][j]) for i in rows]
    lse = [log_sum_exp([torch.tensor(v, dtype=F64) for v in s[i]]).item() for i in rows]
    of_column = [max(rows, key=lambda i, j=j: s[i][j] - lse[i]) for j in rows]
    return of_row, of_column


def oracle(a, b, t) -> torch.Tensor:
    rows = range(len(a))
    of_row, of_column = targets(a, b, float(t.detach()) if isinstance(t, torch.Tensor) else t)
    logits = [[a[i] @ b[j] / t for j in rows] for i in rows]
    a_to_b = sum(log_sum_exp(logits[i]) - logits[i][of_row[i]] for i in rows)
    columns = [[logits[i][j] for i in rows] for j in rows]
    b_to_a = sum(log_sum_exp(columns[j]) - columns[j][of_column[j]] for j in rows)
    return (a_to_b + b_to_a) / (2 * len(a))


@property_test
@given(
    rows=st.integers(2, 6),
    dim=st.sampled_from([1, 3, 8]),
    t=st.sampled_from([0.3, 1.0, 4.0]),
    seed=st.integers(0, 999),
)
def test_is_the_definition(rows, dim, t, seed):
    a, b = randn(rows, dim, seed=seed), randn(rows, dim, seed=seed + 1000)
    temperature = torch.tensor(t, dtype=F64, requires_grad=True)
    assert_same(
        lambda: mnr_plus(a, b, scale=1 / temperature),
        lambda: oracle(a, b, temperature),
        a,
        b,
        temperature,
    )


def test_the_directions_have_different_targets():
    """Row 0 has the largest norm: every row points to it, but it chooses one column only."""
    a = torch.tensor([[3.0, 0.0], [1.0, 0.1], [1.0, -0.1]], dtype=F64)
    assert targets(a, a, 1.0)[0] == [0, 0, 0]
    assert targets(a, a, 1.0)[1] != [0, 0, 0]
    loss, metrics = mnr_plus(a, a, return_metrics=True)
    assert_close(loss, oracle(a, a, 1.0))
    of_row, of_column = targets(a, a, 1.0)
    own = sum(t == i for i, t in enumerate(of_row)) + sum(t == i for i, t in enumerate(of_column))
    assert metrics["own_targets"].item() == pytest.approx(own / 6)
    assert metrics["in_batch_accuracy"].item() == pytest.approx(1 / 3)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_is_the_symmetric_loss_on_normalised_inputs(scale):
    a = randn(8, 16)
    b = (a + 0.5 * randn(8, 16, seed=1)).detach().requires_grad_()
    assert_same(
        lambda: mnr_plus(F.normalize(a, dim=-1), F.normalize(b, dim=-1), scale=scale),
        lambda: info_nce(a, b, scale=scale, symmetric=True),
        a,
        b,
    )
    assert_close(
        mnr_plus(a, b, scale=scale, similarity="cosine"), info_nce(a, b, scale=scale), 1e-12
    )


def test_but_not_for_a_row_in_a_crowd():
    """Unit length, and still column 1 chooses row 0: row 1's log-sum holds the whole crowd."""
    crowd = torch.linspace(1.4, 1.6, 12, dtype=F64)
    angles = torch.cat([torch.tensor([0.0, 0.4], dtype=F64), crowd])
    a = torch.stack([angles.cos(), angles.sin()], dim=1)
    of_row, of_column = targets(a, a, 1.0)
    assert of_row == list(range(14))
    assert of_column[1] == 0
    assert_close(mnr_plus(a, a), oracle(a, a, 1.0))
    assert (mnr_plus(a, a) - info_nce(a, a, scale=1.0)).abs() > 1e-3


def test_one_row_has_no_loss():
    a = randn(1, 4)
    loss = mnr_plus(a, randn(1, 4, seed=1))
    loss.backward()
    assert loss.item() == 0.0
    assert a.grad.abs().max() == 0.0


def test_low_precision_inputs_have_float32_logits_under_autocast_too():
    a, b = randn(6, 8, dtype=torch.bfloat16), randn(6, 8, seed=1, dtype=torch.bfloat16)
    expected = oracle(a.double(), b.double(), 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mnr_plus(a, b)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, 1e-6)


@pytest.mark.parametrize(
    ("a", "b", "kwargs", "message"),
    [
        (randn(2, 3), randn(3, 3), {}, r"b must have shape \[B, d\] = \[2, 3\]; got \[3, 3\]"),
        (randn(0, 3), randn(0, 3), {}, "a must hold at least one row"),
        (randn(2, 3), torch.full((2, 3), torch.nan, dtype=F64), {}, "b must be finite; row 0"),
        (randn(2, 3), randn(2, 3), {"scale": 0.0}, "scale must be greater than 0"),
        (randn(2, 3), randn(2, 3), {"scale": torch.tensor(-1.0)}, "scale must be greater than 0"),
        (randn(2, 3), randn(2, 3), {"scale": torch.tensor(torch.nan)}, "and finite; got nan"),
        (randn(2, 3), randn(2, 3), {"similarity": "l2"}, "similarity must be one of"),
    ],
)
def test_bad_input_is_named(a, b, kwargs, message):
    with pytest.raises(ValueError, match=message):
        mnr_plus(a, b, **kwargs)


def test_blocks_of_rows_are_one_matrix(monkeypatch):
    """Targets, value, gradients and metrics; blocks of 3, 3 and 1 rows."""
    a, b = randn(7, 4), randn(7, 4, seed=1)
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def both() -> tuple:
        loss, metrics = mnr_plus(a, b, scale=scale, return_metrics=True)
        return loss, *torch.autograd.grad(loss, [a, b, scale]), *metrics.values()

    whole = both()
    monkeypatch.setattr(row_blocks, "BLOCK_LOGITS", 3 * 7)
    for one, other in zip(both(), whole, strict=True):
        assert_close(one, other, 1e-12)
