"""``ops.maxsim`` on every backend, against a loop over pairs of vectors in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import ops
from moe_fast.ops.maxsim import maxsim_gradients, tiled

from . import oracle
from .helpers import DTYPES, TOLERANCES, assert_close, num_threads, opcheck_calls, property_test

BACKENDS = [b for b in ops.available_backends("maxsim") if b != "triton"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def starts_of(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def check(queries, documents, dim, dtype, mean, backend, index=torch.int64) -> None:
    """Scores and both gradients, for texts of these lengths."""
    a, b = starts_of(queries), starts_of(documents)
    q = torch.randn(a[-1], dim).to(dtype).requires_grad_()
    p = torch.randn(b[-1], dim).to(dtype).requires_grad_()
    where = torch.tensor(a, dtype=index), torch.tensor(b, dtype=index)
    scores = ops.maxsim(q, p, *where, mean=mean, backend=backend)
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, p)]
    expected = oracle.maxsim(*exact, a, b, mean=mean)
    assert_close(scores, expected, TOLERANCES[dtype], "scores")
    upstream = torch.randn(scores.shape).to(scores.dtype)
    got = torch.autograd.grad(scores, (q, p), upstream)
    if expected.requires_grad:
        want = torch.autograd.grad(expected, exact, upstream.double(), materialize_grads=True)
        for name, grad, reference in zip(("queries", "documents"), got, want, strict=True):
            assert grad.dtype == dtype
            assert_close(grad, reference, TOLERANCES[dtype], f"gradient of {name}")
    again = maxsim_gradients(upstream, q.detach(), p.detach(), *where, mean=mean, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


@backends
@property_test
@given(
    queries=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    documents=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    dim=st.sampled_from([1, 2, 7, 16]),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    mean=st.booleans(),
    tile=st.sampled_from([1, 4, 2048]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, queries, documents, dim, dtype, mean, tile, threads, seed):
    torch.manual_seed(seed)
    before = tiled.TILE["cpu"]
    tiled.TILE["cpu"] = tile
    try:
        with num_threads(threads):
            check(queries, documents, dim, dtype, mean, backend, torch.int32)
    finally:
        tiled.TILE["cpu"] = before


@backends
def test_no_texts(backend):
    x, none, some = torch.ones(3, 4), torch.tensor([0]), torch.tensor([0, 3])
    assert ops.maxsim(x[:0], x, none, some, backend=backend).shape == (0, 1)
    assert ops.maxsim(x, x[:0], some, none, backend=backend).shape == (1, 0)


@backends
def test_views_expanded_gradients_and_nan(backend):
    wide = torch.full((9, 12), torch.nan, dtype=torch.float64)
    wide[:, 4:8] = torch.randn(9, 4, dtype=torch.float64)
    q = wide[:, 4:8].requires_grad_()
    starts = torch.tensor([0, 4, 9])
    scores = ops.maxsim(q, q, starts, starts, backend=backend)
    expected = oracle.maxsim(q, q, [0, 4, 9], [0, 4, 9])
    assert_close(scores, expected)
    for value in (scores, expected):  # the gradient of a sum has stride 0
        (grad,) = torch.autograd.grad(value.sum(), q)
        assert grad.isfinite().all()
    bad = q.detach().clone()
    bad[6, 1] = torch.nan
    assert ops.maxsim(q, bad, starts, starts, backend=backend)[:, 1].isnan().all()


@backends
def test_one_of_equal_products_gets_the_gradient(backend):
    q, p = torch.ones(1, 2), torch.ones(3, 2, requires_grad=True)
    scores = ops.maxsim(q, p, torch.tensor([0, 1]), torch.tensor([0, 3]), backend=backend)
    scores.sum().backward()
    assert p.grad.sum() == 2 and (p.grad != 0).any(1).sum() == 1


@backends
def test_opcheck_and_compile(backend):
    q, p = torch.randn(7, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    starts = torch.tensor([0, 3, 7]), torch.tensor([0, 2, 9])

    def run():
        scores = ops.maxsim(q, p, *starts, backend=backend)
        return torch.autograd.grad(scores.sum(), (q, p))

    opcheck_calls(run, {f"maxsim_{backend}", f"maxsim_{backend}_backward"})
    compiled = torch.compile(ops.maxsim, fullgraph=True, backend="aot_eager")
    scores = compiled(q, p, *starts, backend=backend)
    assert_close(scores, ops.maxsim(q, p, *starts, backend=backend), 1e-6)


def test_autocast_changes_nothing():
    q, p = torch.randn(7, 4), torch.randn(9, 4)
    starts = torch.tensor([0, 3, 7]), torch.tensor([0, 2, 9])
    want = ops.maxsim(q, p, *starts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.maxsim(q, p, *starts), want)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"queries": torch.ones(4)}, ValueError, "queries must have shape"),
        ({"documents": torch.ones(5, 3)}, ValueError, "documents must have shape"),
        ({"documents": torch.ones(5, 2).half()}, TypeError, "documents must have the dtype"),
        ({"queries": torch.ones(4, 2).int()}, TypeError, "queries must have dtype"),
        ({"query_starts": torch.tensor([0, 3])}, ValueError, "query_starts must rise from 0 to 4"),
        ({"document_starts": torch.tensor([0, 6, 5])}, ValueError, "document_starts must rise"),
        ({"document_starts": torch.tensor([0.0, 5.0])}, TypeError, "document_starts must have"),
        ({"query_starts": torch.tensor([], dtype=torch.int64)}, ValueError, "at least one entry"),
        ({"backend": "cpp"}, ValueError, "not implemented"),
    ],
)
def test_bad_input(change, kind, message):
    given = dict(
        queries=torch.ones(4, 2),
        documents=torch.ones(5, 2),
        query_starts=torch.tensor([0, 4]),
        document_starts=torch.tensor([0, 5]),
    )
    with pytest.raises(kind, match=message):
        ops.maxsim(**(given | change))
