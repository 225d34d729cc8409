"""MaxSim's kernels against a loop over pairs in float64: several tiles, NaN around inputs."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops
from moe_fast.ops.maxsim import triton as maxsim_triton
from tests.ops import oracle
from tests.ops.helpers import assert_close

from .rows import guarded

TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
QUERIES = [0, 3, 3, 20]  # one without vectors, more than a tile of 16
DOCUMENTS = [0, 0, 2, 35, 35, 40]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("dim", "mean", "entries"), [(5, True, 2**25), (32, False, 50)])
def test_scores_and_gradients(monkeypatch, dtype, dim, mean, entries):
    monkeypatch.setattr(maxsim_triton, "MOST_ENTRIES", entries)
    torch.manual_seed(0)
    q = guarded(torch.randn(QUERIES[-1], dim).to(dtype)).requires_grad_()
    p = guarded(torch.randn(DOCUMENTS[-1], dim).to(dtype)).requires_grad_()
    starts = torch.tensor(QUERIES), torch.tensor(DOCUMENTS, dtype=torch.int32)
    scores = ops.maxsim(q, p, *starts, mean=mean, backend="triton")
    exact = [x.detach().double().requires_grad_() for x in (q, p)]
    expected = oracle.maxsim(*exact, QUERIES, DOCUMENTS, mean=mean)
    assert_close(scores, expected, TOLERANCES[dtype], "scores")
    upstream = torch.randn(scores.shape, dtype=scores.dtype)
    got = torch.autograd.grad(scores, (q, p), upstream)
    want = torch.autograd.grad(expected, exact, upstream.double())
    for name, grad, reference in zip(("queries", "documents"), got, want, strict=True):
        assert grad.dtype == dtype
        assert_close(grad, reference, TOLERANCES[dtype], name)


def test_nan_is_not_lost():
    q, p = torch.randn(4, 8), torch.randn(40, 8)
    p[17, 3] = torch.nan
    starts = torch.tensor([0, 2, 4]), torch.tensor([0, 20, 40])
    scores = ops.maxsim(q, p, *starts, backend="triton")
    assert scores[:, 0].isnan().all() and scores[:, 1].isfinite().all()


def test_the_same_bits_every_time():
    q, p = torch.randn(QUERIES[-1], 8), torch.randn(DOCUMENTS[-1], 8)
    starts = torch.tensor(QUERIES), torch.tensor(DOCUMENTS)
    runs = []
    for _ in range(2):
        a, b = q.clone().requires_grad_(), p.clone().requires_grad_()
        scores = ops.maxsim(a, b, *starts, backend="triton")
        runs.append((scores, *torch.autograd.grad(scores.sum(), (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
