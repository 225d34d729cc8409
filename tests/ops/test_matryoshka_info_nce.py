"""matryoshka_info_nce is info_nce of the embeddings cut to each length, tile by tile."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops
from moe_fast.ops.info_nce import tiles as logit_tiles

from .helpers import assert_close, assert_gradients_close, assert_says, gradients, opcheck_calls
from .test_info_nce import F64, ONE, OPTIONS, B, D, G, problem

DIMS = [1, 3, 4]  # and the fifth dimension in none
UPSTREAM = torch.tensor([1.0, -0.5, 2.0], dtype=F64)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(logit_tiles.TILE_ROWS, "cpu", 4)


def one_by_one(inputs: dict, dims: list[int], **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense reference at each length."""
    losses = []
    for dim in dims:
        cut = {n: t if t is None or t.dim() == 0 else t[:, :dim] for n, t in inputs.items()}
        loss, stats = ops.info_nce(**cut, backend="torch", return_stats=True, **kwargs)
        losses.append(loss)
    return torch.stack(losses), stats.accuracy


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_row", [0, G])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_those_of_each_length(options, per_row, symmetric, similarity):
    kwargs = OPTIONS[options](B, B + B * per_row) | dict(symmetric=symmetric, similarity=similarity)
    inputs = problem(per_row=per_row, scale=5.0 if similarity == "cosine" else 0.7)
    losses, accuracy = ops.matryoshka_info_nce(**inputs, dims=DIMS, **kwargs)
    expected, best = one_by_one(inputs, DIMS, **kwargs)
    assert_close(losses, expected)
    assert accuracy == best
    assert not accuracy.requires_grad
    assert_gradients_close(
        gradients([losses], [UPSTREAM], inputs), gradients([expected], [UPSTREAM], inputs)
    )


@pytest.mark.parametrize("dims", [[D], [2], [1, 2, 3, 4, 5]])
def test_any_lengths(dims):
    inputs = problem()
    losses, _ = ops.matryoshka_info_nce(**inputs, dims=dims)
    expected, _ = one_by_one(inputs, dims)
    assert_close(losses, expected)
    upstream = torch.ones(len(dims), dtype=F64)
    assert_gradients_close(
        gradients([losses], [upstream], inputs), gradients([expected], [upstream], inputs)
    )


def test_rows_that_are_zero_at_a_length():
    """No direction there, and no gradient from there."""
    inputs = problem()
    with torch.no_grad():
        inputs["a"][1, :3] = 0
        inputs["b"][2, 0] = 0
    losses, _ = ops.matryoshka_info_nce(**inputs, dims=DIMS)
    expected, _ = one_by_one(inputs, DIMS)
    assert_close(losses, expected)
    assert_gradients_close(
        gradients([losses], [UPSTREAM], inputs), gradients([expected], [UPSTREAM], inputs)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_have_float32_logits_under_autocast_too(dtype):
    inputs = problem(dtype=dtype, num_rows=20, scale=20.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = ops.matryoshka_info_nce(**inputs, dims=DIMS)
    doubles = {n: t.detach().double() for n, t in inputs.items()}
    assert losses.dtype == torch.float32
    assert_close(losses, one_by_one(doubles, DIMS)[0], 1e-5)


def test_gradcheck_and_opcheck():
    inputs = problem(num_rows=3, per_row=1)

    def function(a, b, negatives, scale):
        return ops.matryoshka_info_nce(a, b, negatives, scale=scale, dims=DIMS)[0]

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    opcheck_calls(
        lambda: function(**inputs).sum().backward(),
        {"matryoshka_info_nce", "matryoshka_info_nce_backward"},
    )


def test_compiles_as_one_graph():
    torch.compiler.reset()
    inputs = problem()

    def function(a, b, negatives, scale):
        return ops.matryoshka_info_nce(a, b, negatives, scale=scale, dims=DIMS)[0].sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(**inputs), function(**inputs)
    assert_close(actual, expected, 1e-14)
    assert_gradients_close(
        gradients([actual], [ONE], inputs, retain_graph=False),
        gradients([expected], [ONE], inputs),
        1e-14,
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(dims=[]), ["dims", "one or more"]),
        (dict(dims=[2, 1]), ["dims", "increasing", "[2, 1]"]),
        (dict(dims=[2, 6]), ["dims", "d = 5", "[2, 6]"]),
        (dict(dims=[0]), ["dims", "at least 1"]),
        (dict(similarity="l2"), ["similarity", "l2"]),
        (dict(b=torch.full((B, D), torch.nan)), ["b must be finite", "row 0"]),
        (dict(a=torch.ones(1, D), b=torch.ones(1, D)), ["needs negatives", "B = 1"]),
    ],
)
def test_bad_input(change, says):
    good = dict(a=torch.randn(B, D), b=torch.randn(B, D), scale=20.0, dims=[2, 4])
    with pytest.raises((ValueError, TypeError)) as error:
        ops.matryoshka_info_nce(**good | change)
    assert_says(error, *says)
