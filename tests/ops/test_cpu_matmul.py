"""Products by oneDNN are products, of any shape and stride; where it cannot serve, torch does."""

from __future__ import annotations

import pytest
import torch

from moe_fast.ops import cpu_matmul

from .helpers import assert_close


@pytest.fixture(autouse=True, params=["onednn", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(cpu_matmul, "_works", lambda: False)
    elif not cpu_matmul._works():
        pytest.skip("this torch has no such op")
    monkeypatch.setattr(cpu_matmul, "_SMALLEST", 1)
    return request.param


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (64, 33, 130), (2, 300, 1)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_is_the_product(shape, transposed):
    m, k, n = shape
    x = torch.randn(k, m).t() if transposed[0] else torch.randn(m, k)
    y = torch.randn(n, k).t() if transposed[1] else torch.randn(k, n)
    exact = x.double() @ y.double()
    assert_close(cpu_matmul.multiply(x, y), exact, 1e-5)
    total = torch.randn(m, n)
    expected = total.double() + exact
    cpu_matmul.add_product(total, x, y)
    assert_close(total, expected, 1e-5)


def test_autocast_changes_nothing():
    x, y = torch.randn(30, 40), torch.randn(40, 20)
    expected = cpu_matmul.multiply(x, y)
    total = torch.zeros(30, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cpu_matmul.multiply(x, y), expected)
        cpu_matmul.add_product(total, x, y)
    assert_close(total, expected, 1e-6)


def test_slices_of_larger_matrices():
    x, y = torch.randn(40, 90)[3:20, 10:50], torch.randn(60, 70)[5:45, 1:31]
    assert_close(cpu_matmul.multiply(x, y), x.double() @ y.double(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype, monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_linear", lambda *_: pytest.fail("not for this dtype"))
    x, y = torch.randn(4, 5).to(dtype), torch.randn(5, 6).to(dtype)
    assert torch.equal(cpu_matmul.multiply(x, y), x @ y)


def test_what_is_switched_off_is_not_used(monkeypatch):
    monkeypatch.setattr(cpu_matmul, "_linear", lambda *_: pytest.fail("switched off"))
    x, y = torch.randn(4, 5), torch.randn(5, 6)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(cpu_matmul.multiply(x, y), x @ y)
