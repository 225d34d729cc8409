"""Padded plans against a loop, and the grouped products over rows that are sorted and padded."""

from __future__ import annotations

import pytest
import torch
from moe_fast.triton_ops import padded_plan, persistent_linear
from moe_fast.triton_ops.config import Config
from moe_fast.triton_ops.grad_hidden import grad_hidden
from moe_fast.triton_ops.grad_weight import grad_weight
from moe_fast.triton_ops.linear import linear
from moe_fast.triton_ops.padded_plan import pad_plan, padded_rows, sort_rows
from moe_fast.triton_ops.router_grad import router_grad
from moe_fast.triton_ops.up_projection import up_projection

from tests.ops.helpers import TOLERANCES, assert_close

from .rows import Rows, guarded, sorted_rows
from .test_grouped_products import BF16, COUNTS, F16, F32, GROUPED, SMALL, TILES, WIDE, new, poison

PAD = 32
DIM, HIDDEN = 40, 24


@pytest.fixture(autouse=True)
def small_pad(monkeypatch):
    monkeypatch.setattr(padded_plan, "PAD_ROWS", PAD)


def some_rows(counts: list[int], k: int = 1) -> Rows:
    return sorted_rows(counts, skipped=5 + (sum(counts) + 5) % 2, k=k)


@pytest.mark.parametrize("counts", [*COUNTS, [0, 0], [32, 64, 0, 33]], ids=str)
def test_the_padded_plan(counts):
    rows = some_rows(counts, k=2)
    got = pad_plan(rows.plan)
    tokens, slots, offsets = [], [], [0]
    for e, count in enumerate(counts):
        first = int(rows.offsets[e])
        more = -count % PAD
        tokens += rows.row_to_token[first : first + count].tolist() + [-1] * more
        slots += rows.row_to_slot[first : first + count].tolist() + [-1] * more
        offsets.append(len(slots))
    slot_to_row = [-1] * len(rows.slot_to_row)
    for row, slot in enumerate(slots):
        if slot >= 0:
            slot_to_row[slot] = row
    valid = int(rows.offsets[-1])
    size = padded_rows(len(rows.row_to_slot), len(counts))
    slots += rows.row_to_slot[valid:].tolist()
    tokens += rows.row_to_token[valid:].tolist()
    assert size % PAD == 0 and len(slots) <= size
    assert got.expert_offsets.tolist() == offsets
    assert got.row_to_slot.tolist() == slots + [-1] * (size - len(slots))
    assert got.row_to_token.tolist() == tokens + [-1] * (size - len(tokens))
    assert got.slot_to_row.tolist() == slot_to_row
    tiles = [e for e, count in enumerate(counts) for _ in range(-(-count // PAD))]
    assert got.tile_expert.tolist() == tiles + [len(counts)] * (size // PAD - len(tiles))


def test_no_rows_at_all():
    empty = torch.zeros(0, dtype=torch.int64)
    got = pad_plan((torch.zeros(3, dtype=torch.int64), empty, empty))
    assert got.expert_offsets.tolist() == [0, 0, 0]
    assert (got.row_to_slot == -1).all() and len(got.row_to_slot) == padded_rows(0, 2)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_sorted_rows(dtype):
    rows = some_rows(COUNTS[0], k=2)
    x = new(len(rows.row_to_slot) // 2, 133, dtype=dtype)
    got = pad_plan(rows.plan)
    actual = sort_rows(x, got)
    expected = torch.where((got.row_to_token >= 0)[:, None], x[got.row_to_token], 0)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("counts", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "config", "gated"),
    [(BF16, SMALL, False), (F32, WIDE, True), (F16, TILES, True), (BF16, TILES, False)],
)
def test_products_of_sorted_rows_as_of_gathered_ones(dtype, config, gated, counts):
    """The same products by both orders, row by row; both are compared with float64 elsewhere."""
    rows = some_rows(COUNTS[counts])
    tokens, experts = len(rows.row_to_token), len(COUNTS[counts])
    padded = pad_plan(rows.plan)
    x = poison(new(tokens, DIM, dtype=dtype), rows, by_token=True)
    grad = poison(new(tokens, DIM, dtype=dtype), rows, by_token=True)
    width = 2 * HIDDEN if gated else HIDDEN
    w1 = new(experts, width, DIM, dtype=dtype, scale=DIM**-0.5)
    w2 = new(experts, DIM, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5)
    b1, b2 = new(experts, width, dtype=dtype), new(experts, DIM, dtype=dtype)
    weights = poison(guarded(torch.rand(tokens)), rows, by_token=True)
    plain = config if config is not TILES else SMALL  # no descriptors in these products
    form = dict(act="gelu", gated=gated)

    def results(plan, sort, slot_to_row, **order):
        gathered, to = not order, dict(padded=padded) if order else {}
        more = dict(padded=True, config=plain) if order else dict(config=plain)
        up = dict(want_z=True, want_h=True, config=config, **form, **order)
        z, h = up_projection(sort(x), w1, b1, *plan[:2], **up)
        rows_of = dict(gather=False, scatter=True, config=config, **to)
        y = linear(h, w2, b2, weights, plan, **rows_of)
        assert (z[int(plan[0][-1]) :] == 0).all()
        down = dict(want_bias=True, config=plain, **form, **order)
        dz, wh, dots, db1 = grad_hidden(sort(grad), w2, z, weights, plan, **down)
        dw = router_grad(dots, None, grad, b2, weights[:, None], plan)
        dw2 = grad_weight(sort(grad), wh, None, plan, gather_a=gathered, gather_b=False, **more)
        dw1 = grad_weight(dz, sort(x), None, plan, gather_a=False, gather_b=gathered, **more)
        dx = linear(dz, w1.mT, None, None, plan, **rows_of)
        used = slot_to_row[rows.row_to_slot[: rows.offsets[-1]]]
        by_row = {"z": z[used], "h": h[used], "dz": dz[used], "wh": wh[used]}
        return by_row | {"y": y, "db1": db1, "dw": dw, "dw2": dw2, "dw1": dw1, "dx": dx}

    expected = results(rows.plan, lambda t: t, rows.slot_to_row)
    actual = results(
        padded[:3], lambda t: sort_rows(t, padded), padded.slot_to_row, gather=False, padded=True
    )
    for name, value in expected.items():
        assert value.isfinite().all(), name
        assert_close(actual[name], value.double(), TOLERANCES[dtype], name)


def test_linear_by_grouped_mm_in_token_order():
    rows = some_rows(COUNTS[0])
    padded, tokens = pad_plan(rows.plan), len(rows.row_to_token)
    x = poison(new(tokens, DIM, dtype=F32), rows, by_token=True)
    w, bias = new(7, HIDDEN, DIM, dtype=F32), new(7, HIDDEN, dtype=F32)
    form = dict(gather=False, scatter=True, padded=padded)
    x = sort_rows(x, padded)
    weights = torch.rand(tokens)
    actual = linear(x, w, bias, weights, padded[:3], config=GROUPED, **form)
    expected = linear(x, w, bias, weights, padded[:3], config=SMALL, **form)
    assert actual.shape == (tokens, HIDDEN)
    assert_close(actual, expected.double(), 1e-6)


@pytest.mark.parametrize("scatter", [True, False])
@pytest.mark.parametrize(
    ("dtype", "transposed", "bias"), [(BF16, False, True), (F32, True, False), (F16, True, True)]
)
def test_persistent_linear(monkeypatch, dtype, transposed, bias, scatter):
    """Three programs, as many tiles of columns as do not divide N, and NaN in the next expert."""
    monkeypatch.setattr(persistent_linear, "PAD_ROWS", PAD)
    config = Config(16, 32, 16, num_warps=4, num_stages=1, group_m=2, persistent=True)
    rows = some_rows(COUNTS[0])
    tokens, dim, out = len(rows.row_to_token), 48, 40
    padded = pad_plan(rows.plan)
    x = sort_rows(poison(new(tokens, dim, dtype=dtype), rows, by_token=True), padded)
    w = new(7, out, dim, dtype=dtype, scale=dim**-0.5)
    w[0] = w[4] = w[6] = float("nan")  # experts without rows
    if transposed:
        w = guarded(w.mT.contiguous()).mT
    b = new(7, out, dtype=dtype) if bias else None
    weights = poison(guarded(torch.rand(tokens)), rows, by_token=True) if bias else None
    form = dict(gather=False, scatter=scatter, padded=padded)
    actual = linear(x, w, b, weights, padded[:3], config=config, **form)
    expected = linear(x, w, b, weights, padded[:3], config=SMALL, **form)
    used = slice(None) if scatter else padded.row_to_slot[: padded.expert_offsets[-1]] >= 0
    if not scatter:
        actual, expected = (t[: padded.expert_offsets[-1]] for t in (actual, expected))
    assert_close(actual[used], expected[used].double(), TOLERANCES[dtype])
    # gathered rows are computed by the heuristic's tiles
    plain = linear(x, w, None, None, padded[:3], gather=False, scatter=False, config=config)
    assert plain[: padded.expert_offsets[-1]].isfinite().all()
