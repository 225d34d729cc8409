"""The native ops on the whole grid of E, D, K and T, against the reference in float64.

Every cell of E x D x K x T meets a kind of ids, or all three; dtypes and kinds take turns from cell
to cell, so that each dtype meets every E, D, K, T and kind. Outputs and all gradients; tolerances
are those of ``test_expert_mlp_cpp.py``. H is small: other tests vary it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from moe_fast import ops

from . import test_expert_linear_cpp as linear
from . import test_expert_mlp_cpp as mlp
from .helpers import (
    DTYPES,
    TOLERANCES,
    assert_close,
    assert_gradients_close,
    gradients,
    leaves,
    need_native_library,
)

need_native_library()

EXPERTS = [1, 2, 3, 5, 6, 7, 8, 16]
DIMS = [64, 384, 512, 768, 1024]
HIDDEN = 48
KINDS = ["any", "all to one", "one has none"]


def cells() -> list:
    """(E, K, D), each once: K = 2 and K = E may be the same."""
    pairs = [(e, k) for e in EXPERTS for k in sorted({1, 2, e}) if k <= e]
    return [pytest.param(e, k, d, id=f"E{e}-K{k}-D{d}") for (e, k), d in product(pairs, DIMS)]


def token_counts(k: int) -> list[int]:
    """None, one, an odd number, and more than one block of rows per expert, or of tokens."""
    return [0, 1, 33, 1031 if k == 1 else 131]


def draw_ids(kind: str, tokens: int, k: int, experts: int) -> Tensor:
    """[T, K]; of any kind E itself is drawn too: skipped."""
    if kind == "any":
        return torch.randint(0, experts + 1, (tokens, k))
    one = int(torch.randint(0, experts, ()))
    if kind == "all to one":
        return torch.full((tokens, k), one)
    return (one + torch.randint(1, max(experts, 2), (tokens, k))) % max(experts, 2)


def turns(experts: int, k: int, dim: int) -> Iterator[tuple[int, str, torch.dtype]]:
    """(T, kind, dtype) of a cell."""
    number = experts + k + DIMS.index(dim)
    for tokens in token_counts(k):
        kinds = KINDS if tokens == 33 else [KINDS[number % len(KINDS)]]
        for kind in kinds:
            yield tokens, kind, DTYPES[(number + number // len(KINDS)) % len(DTYPES)]
            number += 1


@pytest.mark.parametrize(("experts", "k", "dim"), cells())
def test_cell(experts, k, dim):
    for tokens, kind, dtype in turns(experts, k, dim):
        plan = assert_same_plan(draw_ids(kind, tokens, k, experts), experts)
        check_mlp(tokens, k, experts, dim, dtype, plan)
        check_linear(tokens, k, experts, dim, dtype, plan)
        check_rows(tokens, k, dim, dtype, plan)


def assert_same_plan(ids: Tensor, experts: int) -> ops.RoutingPlan:
    actual = ops.plan(ids, experts, block_sizes=(16,), backend="cpp")
    expected = ops.plan(ids, experts, block_sizes=(16,), backend="torch")
    assert torch.equal(actual.tiles[16], expected.tiles[16])
    for field in ("expert_offsets", "row_to_token", "row_to_slot", "slot_to_row"):
        assert torch.equal(getattr(actual, field), getattr(expected, field)), field
    return actual


def check_mlp(tokens, k, experts, dim, dtype, plan) -> None:
    inputs, _ = mlp.problem(tokens, k, experts, dim, HIDDEN, dtype=dtype)
    check_against_double(mlp.run, inputs, plan, torch.randn(tokens, dim), dtype)


def check_linear(tokens, k, experts, dim, dtype, plan) -> None:
    inputs, _ = linear.problem(tokens, k, experts, dim, HIDDEN, dtype=dtype)
    check_against_double(linear.run, inputs, plan, torch.randn(tokens, HIDDEN), dtype)


def check_against_double(run, inputs, plan, upstream, dtype) -> None:
    """Output and every gradient, in value and dtype."""
    upstream = upstream.to(dtype)
    actual = run(inputs, plan, upstream, "cpp")
    expected = run(mlp.in_double(inputs), plan, upstream, "torch")
    for name, value in expected.items():
        assert actual[name].dtype == (dtype if name == "y" else inputs[name].dtype), name
        tolerance = mlp.TOLERANCES[dtype]
        if name == "top_k_weights" and value.shape[0] == 1 and value.any():
            # A lone sum of products of unit scale, one per output: it may cancel, and is then
            # compared with what such a sum usually is.
            tolerance *= max(1.0, upstream.shape[1] ** 0.5 / value.abs().max().item())
        assert_close(actual[name], value, tolerance, name)


def check_rows(tokens, k, dim, dtype, plan) -> None:
    """Gathered, then combined: outputs, and the gradients of x and the weights."""
    given = leaves(x=torch.randn(tokens, dim).to(dtype), weights=torch.rand(tokens, k))
    exact = leaves(**{n: t.double() for n, t in given.items()})
    outputs = []
    for tensors, backend in ((given, "cpp"), (exact, "torch")):
        rows = ops.gather_rows(tensors["x"], plan, backend=backend)
        outputs.append(ops.combine_rows(rows, tensors["weights"], plan, backend=backend))
    actual, expected = outputs
    upstream = [torch.randn(tokens, dim).to(dtype)]
    assert_close(actual, expected, TOLERANCES[dtype])
    assert_gradients_close(
        gradients([actual], upstream, given),
        gradients([expected], upstream, exact),
        TOLERANCES[dtype],
    )


def test_every_dtype_meets_every_value():
    """Of E, K, D, T and kind: the rule by which dtypes take turns leaves none out."""
    met: dict[torch.dtype, set] = {dtype: set() for dtype in DTYPES}
    wanted = set()
    for cell in cells():
        experts, k, dim = cell.values
        for tokens, kind, dtype in turns(experts, k, dim):
            values = {("E", experts), ("K", k), ("D", dim), ("T", tokens), kind}
            met[dtype] |= values
            wanted |= values
    assert all(met[dtype] == wanted for dtype in DTYPES)
