"""int8_linear: a linear map whose weight and inputs are 8-bit integers, for inference.

    y_t = s_t scale (V q_t - z_t sums) + b

in the symbols of ``moe_fast/ops/int8_weight.py``. With ``norm``, y is added to a residual and
normalised, as at the end of a BERT layer's attention:

    out_t = LayerNorm(y_t + residual_t)

Backend ``cpp`` multiplies by AMX, by AVX-512 VNNI, or in 16-bit integers (AVX-512, AVX2), as the
processor allows (kernels/csrc/cpu/int8_simd.cpp); ``torch`` multiplies the integers in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import FLOAT_DTYPES, check_choice, check_dtype, check_like, check_shape
from moe_fast.ops.int8_linear import cpp, reference  # noqa: F401 - each registers itself
from moe_fast.ops.int8_weight import (
    Int8Norm,
    Int8Weight,
    check_inference,
    check_norm,
    check_range,
    check_rows,
    check_weight,
)


def int8_linear(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    input_range: Tensor | None = None,
    norm: Int8Norm | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the linear map; see the module's docstring for the mathematics.

    Args:
        x: [T, K] float32, bfloat16, float16 or float64.
        weight: of an [N, K] matrix, from :func:`moe_fast.ops.quantize_weight`.
        bias: [N] float32 or ``None``.
        input_range: [2] float32, the least and the greatest value of x, if they are fixed; greater
            ones are limited to it. ``None``: each row has its own.
        norm: what follows, in the same pass; its residual is [T, N] in ``dtype``.
        dtype: of the result; ``None``: x's.
        backend: see :func:`moe_fast.use_backend`.

    Returns:
        [T, N] in ``dtype``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or gradients are needed.
    """
    norm = norm or Int8Norm()
    dtype = dtype or x.dtype
    run = _prepare(x, *weight, bias, input_range, *norm[:3], dtype, backend)
    check_range("input_range", input_range)
    return run(x, *weight, bias, input_range, *norm, str(dtype).removeprefix("torch."))


@once_per_signature
def _prepare(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    input_range: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype,
    backend: str | None,
) -> Callable:
    """Check the arguments and return the implementation to run."""
    check_shape("x", x, (None, None), "[T, K]")
    check_dtype("x", x, FLOAT_DTYPES)
    check_choice("dtype", dtype, FLOAT_DTYPES)
    rows = check_weight("weight", Int8Weight(values, scale, sums), (), x.shape[1])
    check_rows(bias=(bias, rows), input_range=(input_range, (2,)))
    check_norm(residual, norm_weight, norm_bias, (x.shape[0], *rows), dtype)
    check_like("x", x, dtype=False, values=values, scale=scale, sums=sums, bias=bias)
    check_inference("int8_linear", x, residual)
    computed_in = torch.promote_types(x.dtype, dtype)
    return backends.select("int8_linear", backend, x.device, computed_in)
