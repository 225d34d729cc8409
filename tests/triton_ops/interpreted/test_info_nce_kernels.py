"""The contrastive loss's kernels: several tiles and rectangles, NaN around inputs, guarded outputs.

Values and all gradients against a loop over pairs in float64. Cases hold every pair of settings
that a kernel branches on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from moe_fast.triton_ops.add_product import add_product
from moe_fast.triton_ops.config import Config

from moe_fast import ops
from moe_fast.ops.info_nce import triton as info_nce_triton
from tests.ops import oracle
from tests.ops.helpers import assert_close, gradients, leaves

from .rows import guarded

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
AXES = dict(
    dtype=(F64, F32, BF16, F16),
    size=((3, 5), (40, 32), (66, 33)),  # pairs, d: tiles of 32, rectangles of 64 rows
    per_row=(0, 1),
    symmetric=(True, False),
    similarity=("cosine", "dot"),
    texts=(False, True),
    domains=(False, True),
    groups=(False, True),
    smoothing=(0.0, 0.2),
    weights=(False, True),
)
# Relative to the largest entry. float32: logits of up to 20 lose 20 roundings of 6e-8, and
# gradients are exponentials of them. Below, the gradient of the logits is rounded once (bfloat16
# 3.9e-3; float16 as TF32, 4.9e-4), and the result once more, before and after lengths are removed.
TOLERANCES = {F64: 1e-10, F32: 2e-5, BF16: 2e-2, F16: 2e-3}


def cases() -> Iterator[dict]:
    """Cases that together hold every pair of values, chosen greedily from random ones."""
    generator = torch.Generator().manual_seed(0)

    def pairs(case: dict) -> set:
        return set(itertools.combinations(case.items(), 2))

    def draw() -> dict:
        pick = {n: int(torch.randint(len(v), (), generator=generator)) for n, v in AXES.items()}
        return {n: values[pick[n]] for n, values in AXES.items()}

    axes = itertools.combinations(AXES.values(), 2)
    missing = sum(len(p) * len(q) for p, q in axes)
    seen: set = set()
    while len(seen) < missing:
        best = max((draw() for _ in range(50)), key=lambda case: len(pairs(case) - seen))
        if pairs(best) - seen:
            seen |= pairs(best)
            yield best


def problem(case: dict) -> tuple[dict, dict]:
    """Leaves with NaN around them, and the options."""
    (batch, dim), per_row = case["size"], case["per_row"]

    def new(rows: int) -> torch.Tensor:
        return guarded(torch.randn(rows, dim).to(case["dtype"])).requires_grad_()

    acc = torch.promote_types(case["dtype"], F32)
    scale = torch.tensor(10.0 if case["similarity"] == "cosine" else 0.5, dtype=acc)
    inputs = dict(a=new(batch), b=new(batch), negatives=new(batch * per_row) if per_row else None)
    options = dict(
        similarity=case["similarity"],
        symmetric=case["symmetric"],
        label_smoothing=case["smoothing"],
    )
    if case["texts"]:
        hashes = torch.arange(batch) * 2305843009213693951
        options["row_ids"] = hashes[torch.randint(batch, (batch,))]
        options["col_ids"] = hashes[torch.randint(batch, (batch * (1 + per_row),))]
    if case["domains"]:
        options["domain_ids"] = torch.randint(0, 2, (batch,))
    if case["groups"]:
        options["group_ids"] = torch.randint(0, batch, (batch,))
    if case["weights"]:
        options["weights"] = guarded(torch.rand(batch) + 0.1)
    return inputs | {"scale": scale.requires_grad_()}, options


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_values_and_gradients(case, monkeypatch):
    for itemsize in info_nce_triton.SPANS:
        monkeypatch.setitem(info_nce_triton.SPANS, itemsize, 64)
    monkeypatch.setattr(info_nce_triton, "_ALIGNMENT", 32)
    inputs, options = problem(case)
    loss, stats = ops.info_nce(**inputs, **options, return_stats=True, backend="triton")
    wide = leaves(**{n: None if t is None else t.double() for n, t in inputs.items()})
    expected = oracle.info_nce(**wide, **options)
    exact = TOLERANCES[F64 if case["dtype"] == F64 else F32]  # sums are never narrower
    assert_close(loss, expected.loss, exact, "loss")
    assert_close(stats.row_loss, expected.row_loss, exact, "row_loss")
    assert torch.equal(stats.rank, expected.rank)
    one = torch.ones((), dtype=F64)
    actual = gradients([loss], [one], inputs)
    for name, gradient in gradients([expected.loss], [one], wide).items():
        tolerance = exact if name == "scale" else TOLERANCES[case["dtype"]]
        assert actual[name].dtype == inputs[name].dtype
        assert_close(actual[name], gradient, tolerance, name)


@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_add_product(transposed, columns):
    """Tiles finished in 1, 1 and 2 runs of columns; a total that is part of a larger one."""
    a, b = guarded(torch.randn(40, 50)), guarded(torch.randn(50, 133))
    if transposed:
        a = guarded(torch.randn(50, 40)).t()
    total = torch.full((60, 200), torch.nan)
    total[:40, :133] = before = torch.randn(40, 133)
    add_product(total[:40, :133], a, b, Config(16, columns, 16, 4, 1))
    assert_close(total[:40, :133], before + a.double() @ b.double(), 1e-6)
    assert total[40:].isnan().all() and total[:, 133:].isnan().all()


def test_a_tile_in_several_runs_of_columns(monkeypatch):
    """As on a GPU: finished 32 columns at a time, and 16 at a time where texts are compared."""
    from moe_fast.triton_ops import info_nce, info_nce_grad

    for kernels in (info_nce, info_nce_grad):
        monkeypatch.setattr(kernels, "config_of", lambda *_: Config(32, 128, 16, 4, 1))
    texts = torch.randint(0, 30, (3, 34))
    for options in ({}, dict(row_ids=texts[0], col_ids=texts[1:].flatten())):
        inputs = {
            n: torch.randn(34, 8, dtype=F64).requires_grad_() for n in ("a", "b", "negatives")
        }
        loss, stats = ops.info_nce(
            **inputs, scale=5.0, **options, return_stats=True, backend="triton"
        )
        expected = oracle.info_nce(**inputs, scale=5.0, **options)
        assert_close(loss, expected.loss)
        assert torch.equal(stats.rank, expected.rank)
        one = torch.ones((), dtype=F64)
        actual, wanted = (gradients([o], [one], inputs) for o in (loss, expected.loss))
        for name, gradient in wanted.items():
            assert_close(actual[name], gradient, what=name)


@pytest.mark.parametrize("scale", [43.0, 44.0, 90.0])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_scales_on_both_sides_of_one_exponential_per_pair(dtype, scale):
    """Logits as far apart as cosines allow: own pairs are opposite, others equal to the anchor."""
    batch, dim = 6, 4
    a = torch.nn.functional.normalize(torch.randn(1, dim, dtype=F64), dim=1).repeat(batch, 1)
    signs = torch.tensor([-1.0, 1, 1, -1, 1, 1], dtype=F64)
    inputs = dict(a=a.to(dtype), b=(a * signs[:, None]).to(dtype))
    inputs = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    loss = ops.info_nce(**inputs, scale=scale, backend="triton")
    expected = ops.info_nce(**wide, scale=scale, backend="torch")
    tolerance = 1e-10 if dtype == F64 else 2e-5
    assert_close(loss, expected, tolerance, "loss")
    for name, gradient in gradients([expected], [torch.ones((), dtype=F64)], wide).items():
        actual = torch.autograd.grad(loss, inputs[name], retain_graph=True)[0]
        error = (actual.double() - gradient).abs().max()
        assert error <= tolerance * scale, (name, error)


def test_products_of_the_backward_by_cublas(monkeypatch):
    """cuBLAS is called with the rectangle without what pads it, and adds in float32."""
    calls = []

    def addmm(total, h, x, *, out_dtype, out):
        assert out is total and out_dtype == total.dtype == F32 and h.dtype == x.dtype == BF16
        calls.append((h.shape, x.shape))
        return out.add_(h.float() @ x.float())

    monkeypatch.setattr(info_nce_triton, "by_cublas", lambda *_: True)
    monkeypatch.setattr(torch, "addmm", addmm)
    inputs = {n: torch.randn(35, 8).to(BF16).requires_grad_() for n in ("a", "b")}
    loss = ops.info_nce(**inputs, scale=5.0, backend="triton")
    grads = torch.autograd.grad(loss, list(inputs.values()))
    monkeypatch.undo()
    assert calls == [((35, 35), (35, 8))] * 2
    loss = ops.info_nce(**inputs, scale=5.0, backend="triton")
    for actual, expected in zip(
        grads, torch.autograd.grad(loss, list(inputs.values())), strict=True
    ):
        assert_close(actual, expected.double(), TOLERANCES[BF16])
