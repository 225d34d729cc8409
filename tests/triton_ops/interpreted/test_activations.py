"""Activations in float32, with the errors that NVIDIA's approximate instructions may have.

The interpreter cannot run these instructions. Instead the exponential and the reciprocal are made
wrong by the most that the PTX manual allows, up or down, and subnormal numbers become 0.
"""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from moe_fast.triton_ops import numerics
from torch import Tensor

from tests.ops.helpers import assert_close

EXP2_ERROR, RECIPROCAL_ERROR = 2.0**-22, 2.0**-23  # relative; one unit in the last place
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_EXP2_FACTOR, _RECIPROCAL_FACTOR = tl.constexpr(1.0), tl.constexpr(1.0)
COUNT = 2048


@triton.jit
def wrong_exp2(x, MATH: tl.constexpr):
    value = tl.exp2(x) * _EXP2_FACTOR
    return tl.where(value < _SMALLEST_NORMAL, 0.0, value)


@triton.jit
def wrong_reciprocal(x, MATH: tl.constexpr):
    value = (1.0 / x) * _RECIPROCAL_FACTOR
    return tl.where(value < _SMALLEST_NORMAL, 0.0, value)


@triton.jit
def activate_kernel(z_ptr, value_ptr, slope_ptr, ACT: tl.constexpr, MATH: tl.constexpr):
    at = tl.arange(0, 2048)
    value, slope = numerics.activate(tl.load(z_ptr + at), ACT, MATH)
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


def activated(z: Tensor, act: str, math_: str) -> tuple[Tensor, Tensor]:
    value, slope = torch.empty_like(z), torch.empty_like(z)
    activate_kernel[(1,)](z, value, slope, ACT=act, MATH=math_)
    return value, slope


def exactly(z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    leaf = z.double().requires_grad_()
    value = {
        "gelu": lambda x: 0.5 * x * torch.special.erfc(-x / math.sqrt(2)),
        "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
        "silu": lambda x: x * torch.sigmoid(x),
    }[act](leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)], ids=str)
def test_the_worst_of_the_approximate_instructions(monkeypatch, act, signs):
    """Absolute errors far below half a unit in the last place of 16-bit results near 1."""
    here = globals()
    monkeypatch.setitem(here, "_EXP2_FACTOR", tl.constexpr(1 + signs[0] * EXP2_ERROR))
    monkeypatch.setitem(here, "_RECIPROCAL_FACTOR", tl.constexpr(1 + signs[1] * RECIPROCAL_ERROR))
    monkeypatch.setattr(numerics, "exp2", wrong_exp2)
    monkeypatch.setattr(numerics, "reciprocal", wrong_reciprocal)
    z = torch.linspace(-16, 16, COUNT)
    errors = []
    for actual, expected in zip(activated(z, act, "short"), exactly(z, act), strict=True):
        error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
        errors.append(error.max().item())
    assert max(errors) < 5e-7


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "silu", "relu", "clamped_swiglu"])
def test_the_short_form_agrees_with_the_exact_one(act):
    z = torch.linspace(-20, 20, COUNT)
    pairs = zip(activated(z, act, "short"), activated(z, act, "exact"), strict=True)
    for what, (short, exact) in zip(("value", "slope"), pairs, strict=True):
        assert_close(short, exact.double(), 1e-6, what)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_nan_stays_and_large_values_do_not_overflow(act):
    z = torch.full((COUNT,), 3e4)
    z[0], z[1] = math.nan, -3e4
    value, slope = activated(z, act, "short")
    assert value[0].isnan() and slope[0].isnan()
    assert value[1] == 0 and slope[1] == 0
    assert (value[2:] == 3e4).all() and (slope[2:] == 1).all()
