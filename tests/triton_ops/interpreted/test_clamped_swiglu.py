"""expert_mlp by Triton with GPT-OSS's gate, and weights as its model stores them."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops
from tests.ops.helpers import assert_close, leaves

E, D, H, T = 3, 20, 12, 15


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, k):
    """z far beyond the limits; pairs of columns; bfloat16 weights, computed in float32."""
    torch.manual_seed(k)
    up = (torch.randn(E, D, 2 * H) / D**0.5).to(dtype)
    tensors = dict(
        x=(8 * torch.randn(T, D)).to(dtype),
        up=up.mT.unflatten(1, (H, 2)).transpose(1, 2),
        down=(torch.randn(E, H, D) / H**0.5).to(dtype).mT,
        up_bias=torch.randn(E, 2 * H).to(dtype),
        down_bias=torch.randn(E, D).to(dtype),
        weights=torch.rand(T, k),
    )
    plan = ops.plan(torch.randint(0, E + 1, (T, k)), E)
    settings = dict(act="clamped_swiglu", gated=True)
    actual = leaves(**tensors)
    expected = leaves(**{name: t.double() for name, t in tensors.items()})
    y = ops.expert_mlp(*actual.values(), plan, **settings, dtype=torch.float32, backend="triton")
    exact = ops.expert_mlp(*expected.values(), plan, **settings, backend="torch")
    assert_close(y, exact, 1e-5, "y")
    upstream = torch.randn(T, D)
    grads = torch.autograd.grad(y, list(actual.values()), upstream)
    wanted = torch.autograd.grad(exact, list(expected.values()), upstream.double())
    for name, got, want in zip(tensors, grads, wanted, strict=True):
        tolerance = 1e-5 if name == "weights" or dtype == torch.float32 else 1e-2
        assert_close(got, want, tolerance, name)
