"""Products, casts and activations of all kernels, correct on every target.

The accumulator is float32, or float64 for float64 inputs. Triton's interpreter loads bfloat16
correctly but multiplies and rounds it wrongly. Therefore products use float32 copies there, and
rounding to nearest even is written out.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)
# Shapes below this are padded with zeros: the smallest operand that tl.dot takes.
SMALLEST_DOT = 16
# How activations are computed. "exact": by Triton's functions. "short": erf with one exponential,
# accurate enough for 16-bit results. "approximate": the same by NVIDIA's approximate instructions,
# without the range checks around them that take most of an epilogue's instructions.
MATHS = ("exact", "short", "approximate")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` for tiles [M, K] and [K, N], in ``acc``'s dtype."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def halves(tile):
    """The left and the right columns of a tile [M, N], which epilogues process one after the other.

    A whole tile, the results computed from it and all their addresses would not fit the registers.
    """
    N: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, N)), (0, 2, 1)))


@triton.jit
def columns_of(tile, PART: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS equal parts of a tile's columns; PARTS is a power of two."""
    if PARTS > 1:
        left, right = halves(tile)
        if PART < PARTS // 2:
            tile = columns_of(left, PART, PARTS // 2)
        else:
            tile = columns_of(right, PART - PARTS // 2, PARTS // 2)
    return tile


@triton.jit
def cast(value, DTYPE: tl.constexpr):
    """``value`` rounded to nearest even."""
    if _INTERPRETED and tl.bfloat16 == DTYPE and value.dtype != tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def exp2(x, MATH: tl.constexpr):
    """``2 ** x``; for "approximate" as NVIDIA's instruction: relative error 2^-22, subnormals 0."""
    if MATH == "approximate":
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def reciprocal(x, MATH: tl.constexpr):
    """``1 / x``; for "approximate" as NVIDIA's instruction: error 1 ulp, subnormals 0."""
    if MATH == "approximate":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _half_erfc_pair(z, MATH: tl.constexpr):
    """Phi(z), the normal distribution function, and exp(-z^2 / 2), with one exponential.

    Abramowitz and Stegun 7.1.26: erfc(u) = poly(t) exp(-u^2), t = 1 / (1 + p u), u = |z|/sqrt(2);
    absolute error of erf below 1.5e-7, below half a unit in the last place of 16-bit results. The
    factors sqrt(1/2), 1/2 and log2(e) are part of the constants.
    """
    gauss = exp2(z * z * -0.7213475204444817, MATH)
    t = reciprocal(1.0 + 0.2316418882663604 * tl.abs(z), MATH)
    poly = 0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)
    poly = t * (0.127414796 + t * (-0.142248368 + t * poly))
    half_erfc = poly * gauss
    return tl.where(z > 0, 1.0 - half_erfc, half_erfc), gauss


@triton.jit
def _sigmoids(z, MATH: tl.constexpr):
    """The sigmoid of z and of -z, which is 1 less it, both accurate where they are tiny."""
    if MATH == "exact":
        small = tl.exp(-tl.abs(z))
        large = 1.0 / (1.0 + small)
    else:
        small = exp2(tl.abs(z) * -1.4426950408889634, MATH)
        large = reciprocal(1.0 + small, MATH)
    small *= large
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)


@triton.jit
def activate(z, ACT: tl.constexpr, MATH: tl.constexpr):
    """``act(z)`` and ``act'(z)`` for z in the accumulator's dtype; MATH is one of ``MATHS``."""
    if ACT == "gelu":
        if MATH == "exact":
            phi = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            gauss = tl.exp(-0.5 * z * z)
        else:
            phi, gauss = _half_erfc_pair(z, MATH)
        value = z * phi
        slope = phi + z * gauss * 0.3989422804014327
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        s, rest = _sigmoids(1.5957691216057308 * (z + 0.044715 * z * z * z), MATH)
        value = z * s
        slope = s + z * s * rest * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif ACT == "silu":
        s, rest = _sigmoids(z, MATH)
        value = z * s
        slope = s * (1.0 + z * rest)
    elif ACT == "clamped_swiglu":
        inside = z <= 7.0
        z = tl.where(inside, z, 7.0)
        s, rest = _sigmoids(1.702 * z, MATH)
        value = z * s
        slope = tl.where(inside, s * (1.0 + 1.702 * z * rest), 0.0)
    else:
        tl.static_assert(ACT == "relu")
        value = tl.maximum(z, 0.0)
        slope = tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    return value, slope


@triton.jit
def gate(z2, ACT: tl.constexpr):
    """Returns what gated experts multiply ``act(z1)`` by."""
    if ACT == "clamped_swiglu":
        z2 = tl.where(z2 > 7.0, 7.0, tl.where(z2 < -7.0, -7.0, z2)) + 1.0
    return z2


@triton.jit
def gate_backward(grad, z2, ACT: tl.constexpr):
    """Returns the gradient of ``z2`` from that of ``gate(z2)``."""
    if ACT == "clamped_swiglu":
        grad = tl.where(tl.abs(z2) <= 7.0, grad, 0.0)
    return grad
