"""The grouped products, kernel by kernel, in tiles much smaller than the problem.

Row by row in float64 on the same rounded inputs; NaN lies around every input, guards around every
output, and NaN in the rows and tokens that are skipped.
"""

from __future__ import annotations

import math

import pytest
import torch
from moe_fast.triton_ops.config import Config
from moe_fast.triton_ops.grad_hidden import grad_hidden
from moe_fast.triton_ops.grad_weight import grad_weight
from moe_fast.triton_ops.linear import linear
from moe_fast.triton_ops.up_projection import up_projection
from torch import Tensor

from tests.ops.helpers import TOLERANCES, assert_close

from .rows import Rows, guarded, sorted_rows

SMALL = Config(16, 16, 16, num_warps=4, num_stages=1, group_m=2)
WIDE = Config(32, 16, 32, num_warps=4, num_stages=1, group_m=3)
GROUPED = Config(implementation="grouped_mm")
# Cases with it have 72 by 40 or 48: tiles reach past both operands.
TILES = Config(16, 32, 32, num_warps=4, num_stages=1, group_m=2, descriptors=True)
# An empty expert first, in the middle and last; tails of 1; more rows than a tile; one expert.
COUNTS = [[0, 17, 1, 33, 0, 4, 0], [41], [0, 0, 35], [3, 2, 1]]
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Every pair of values of (dtype, counts, gated, bias, config, even k) appears; see the test below.
CASES = [
    (F64, 0, False, True, SMALL, False),
    (F64, 1, True, False, WIDE, True),
    (F32, 2, False, False, WIDE, False),
    (F32, 3, True, True, SMALL, True),
    (BF16, 0, True, False, WIDE, True),
    (BF16, 1, False, True, SMALL, True),
    (BF16, 2, True, True, SMALL, False),
    (BF16, 3, False, False, WIDE, False),
    (F16, 0, False, True, WIDE, True),
    (F16, 2, True, False, SMALL, True),
    (F16, 3, True, True, WIDE, False),
    (F16, 1, False, False, SMALL, False),
    (F64, 2, False, True, SMALL, True),
    (F64, 3, False, False, SMALL, True),
    (F32, 0, True, True, SMALL, False),
    (F32, 1, True, False, WIDE, True),
]


def test_the_cases_cover_every_pair():
    values = list(zip(*CASES, strict=True))
    for i in range(len(values)):
        for j in range(i):
            pairs = set(zip(values[i], values[j], strict=True))
            assert len(pairs) == len(set(values[i])) * len(set(values[j])), (i, j)


def new(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return guarded((torch.randn(shape, dtype=F64) * scale).to(dtype))


def poison(tensor: Tensor, rows: Rows, by_token: bool) -> Tensor:
    """NaN where nothing may be read: rows behind the last, or tokens without a row."""
    valid = rows.offsets[-1]
    if not by_token:
        tensor[valid:] = float("nan")
    else:
        used = set(rows.row_to_token[:valid].tolist())
        tensor[[t for t in range(len(tensor)) if t not in used]] = float("nan")
    return tensor


def problem(case, k: int = 1):
    dtype, counts, gated, bias, config, even = case
    rows = sorted_rows(COUNTS[counts], skipped=5 + (sum(COUNTS[counts]) + 5) % 2, k=k)
    return (
        dtype,
        rows,
        gated,
        bias,
        config,
        {True: 64, False: 37}.get(even, even),
        len(COUNTS[counts]),
    )


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def assert_rows(actual: Tensor, expected: list[Tensor], rows: Rows, tolerance: float, what: str):
    assert_close(actual[: rows.offsets[-1]], torch.stack(expected), tolerance, what)


@pytest.mark.parametrize(
    ("case", "act"), [(case, "gelu") for case in CASES] + [(case, "silu") for case in CASES[1::4]]
)
def test_up(case, act):
    check_up(case, act, hidden=21)


@pytest.mark.parametrize(
    "case",
    [
        (BF16, 0, False, True, TILES, 72),
        (BF16, 3, True, False, TILES, 72),
        (F32, 0, True, True, TILES, 72),
        (F16, 2, False, False, TILES, 72),
    ],
)
def test_up_by_descriptors(case):
    check_up(case, "gelu", hidden=40)


def check_up(case, act: str, hidden: int) -> None:
    dtype, rows, gated, bias, config, dim, experts = problem(case, k=2)
    width = 2 * hidden if gated else hidden
    x = poison(new(len(rows.row_to_token) // 2, dim, dtype=dtype), rows, by_token=True)
    w = new(experts, width, dim, dtype=dtype, scale=dim**-0.5)
    b = new(experts, width, dtype=dtype) if bias else None
    settings = dict(act=act, gated=gated, config=config)
    z, h = up_projection(x, w, b, *rows.plan[:2], **settings, want_z=True, want_h=True)
    for r, e in enumerate(rows.expert):
        expected = w[e].double() @ x[rows.row_to_token[r]].double()
        if bias:
            expected = expected + b[e].double()
        assert_close(z[r], expected, 4 * TOLERANCES[dtype], f"z of row {r}")
    # h from z as it was rounded and saved
    first = z[: len(rows.expert), :hidden].double()
    expected = gelu(first) if act == "gelu" else first * torch.sigmoid(first)
    if gated:
        expected = expected * z[: len(rows.expert), hidden:].double()
    assert_close(h[: len(rows.expert)], expected, TOLERANCES[dtype], "h")
    assert (z[len(rows.expert) :] == 0).all()
    _, alone = up_projection(x, w, b, *rows.plan[:2], **settings, want_z=False, want_h=True)
    assert torch.equal(alone[: len(rows.expert)], h[: len(rows.expert)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("case", CASES[::3])
def test_linear(case, gather, scatter, transposed):
    check_linear(case, gather, scatter, transposed, out=21)


@pytest.mark.parametrize(
    ("case", "gather", "scatter", "transposed"),
    [
        ((BF16, 0, True, True, GROUPED, True), True, True, False),
        ((BF16, 2, False, True, GROUPED, True), False, False, True),
        ((F32, 3, True, False, GROUPED, True), True, False, True),
        ((F32, 0, False, False, GROUPED, True), False, True, False),
        ((F32, 1, False, False, GROUPED, True), False, False, False),
    ],
)
def test_linear_by_grouped_mm(case, gather, scatter, transposed):
    check_linear(case, gather, scatter, transposed, out=24)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("case", "gather", "scatter"),
    [
        ((BF16, 0, True, True, TILES, 72), True, True),
        ((F32, 2, False, False, TILES, 72), False, False),
        ((F32, 0, True, False, TILES, 72), False, True),
    ],
)
def test_linear_by_descriptors(case, gather, scatter, transposed):
    check_linear(case, gather, scatter, transposed, out=48)


def check_linear(case, gather: bool, scatter: bool, transposed: bool, out: int) -> None:
    dtype, rows, weighted, bias, config, dim, experts = problem(case)
    size = len(rows.row_to_token)
    a = poison(new(size, dim, dtype=dtype), rows, by_token=gather)
    w = new(experts, out, dim, dtype=dtype, scale=dim**-0.5)
    if transposed:
        w = guarded(w.mT.contiguous()).mT
    b = new(experts, out, dtype=dtype) if bias else None
    weights = poison(guarded(torch.rand(size)), rows, by_token=True) if weighted else None
    y = linear(a, w, b, weights, rows.plan, gather=gather, scatter=scatter, config=config)
    expected = []
    for r, e in enumerate(rows.expert):
        token = rows.row_to_token[r]
        row = w[e].double() @ a[token if gather else r].double()
        row = row if b is None else row + b[e].double()
        expected.append(row if weights is None else row * weights[rows.row_to_slot[r]].double())
    valid, tokens = rows.offsets[-1], rows.row_to_token
    actual = y[tokens] if scatter else y
    assert_rows(actual, expected, rows, TOLERANCES[dtype], "y")
    if scatter:
        assert (y[tokens[valid:]] == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_grad_hidden(case):
    dtype, rows, gated, bias, config, dim, experts = problem(case, k=2)
    hidden, size = 21, len(rows.row_to_token)
    width = 2 * hidden if gated else hidden
    grad = poison(new(size // 2, dim, dtype=dtype), rows, by_token=True)
    w = new(experts, dim, hidden, dtype=dtype, scale=dim**-0.5)
    z = poison(new(size, width, dtype=dtype), rows, by_token=False)
    weights = guarded(torch.rand(size))
    grad_z, weighted_h, dots, grad_bias = grad_hidden(
        grad, w, z, weights, rows.plan, act="gelu", gated=gated, want_bias=bias, config=config
    )
    sums = torch.zeros(experts, width, dtype=F64)
    wanted_z, wanted_h, wanted_dots = [], [], []
    for r, e in enumerate(rows.expert):
        leaf = z[r].double().clone().requires_grad_()
        h = gelu(leaf[:hidden]) * (leaf[hidden:] if gated else 1)
        grad_h = grad[rows.row_to_token[r]].double() @ w[e].double()
        weight = weights[rows.row_to_slot[r]].double()
        (slope,) = torch.autograd.grad(h, leaf, weight * grad_h)
        wanted_z.append(slope)
        wanted_h.append((weight * h).detach())
        wanted_dots.append((grad_h @ h).detach())
        sums[e] += slope
    assert_rows(grad_z, wanted_z, rows, TOLERANCES[dtype], "dz")
    assert_rows(weighted_h, wanted_h, rows, TOLERANCES[dtype], "w * h")
    assert_rows(dots.sum(0), wanted_dots, rows, TOLERANCES[dtype], "<dh, h>")
    if bias:
        assert_close(grad_bias, sums, TOLERANCES[dtype], "db1")
    else:
        assert grad_bias.numel() == 0


GATHERS = [(True, False), (False, True), (True, True)]
# Every case with every way to gather, and either with every number of splits.
GRAD_WEIGHT = [
    (case, *gather, [1, 2, 4][(i + j) % 3])
    for i, case in enumerate(CASES[1::4])
    for j, gather in enumerate(GATHERS)
]


@pytest.mark.parametrize(("case", "gather_a", "gather_b", "splits"), GRAD_WEIGHT)
def test_grad_weight(case, gather_a, gather_b, splits):
    check_grad_weight(case, gather_a, gather_b, splits, m=21)


@pytest.mark.parametrize(
    ("case", "gather_a", "gather_b"),
    [
        ((BF16, 0, True, False, GROUPED, True), True, True),
        ((BF16, 2, False, False, GROUPED, True), False, True),
        ((F32, 0, False, False, GROUPED, True), True, False),
    ],
)
def test_grad_weight_by_grouped_mm(case, gather_a, gather_b):
    check_grad_weight(case, gather_a, gather_b, None, m=24)


def test_grad_weight_by_grouped_mm_without_rows():
    rows = sorted_rows([0, 0], skipped=0, k=1)
    a, b = torch.zeros(0, 8), torch.zeros(0, 16)
    grad = grad_weight(a, b, None, rows.plan, gather_a=False, gather_b=False, config=GROUPED)
    assert torch.equal(grad, torch.zeros(2, 8, 16))


def check_grad_weight(case, gather_a: bool, gather_b: bool, splits: int | None, m: int) -> None:
    dtype, rows, weighted, _, config, dim, experts = problem(case)
    size = len(rows.row_to_token)
    a = poison(new(size, m, dtype=dtype), rows, by_token=gather_a)
    b = poison(new(size, dim, dtype=dtype), rows, by_token=gather_b)
    weights = guarded(torch.rand(size)) if weighted else None
    form = dict(gather_a=gather_a, gather_b=gather_b, config=config, splits=splits)
    actual = grad_weight(a, b, weights, rows.plan, **form)
    expected = torch.zeros(experts, m, dim, dtype=F64)
    for r, e in enumerate(rows.expert):
        token = rows.row_to_token[r]
        left, right = a[token if gather_a else r].double(), b[token if gather_b else r].double()
        weight = 1 if weights is None else weights[rows.row_to_slot[r]].double()
        expected[e] += weight * left[:, None] * right[None, :]
    assert_close(actual, expected, TOLERANCES[dtype], "dW")
    assert all((actual[e] == 0).all() for e in range(experts) if e not in rows.expert)
    assert torch.equal(actual, grad_weight(a, b, weights, rows.plan, **form))
