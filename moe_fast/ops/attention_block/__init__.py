"""attention_block: a post-norm layer's attention on a packed batch, for inference.

    q, k, v = x Wq^T + bq,  x Wk^T + bk,  x Wv^T + bv
    q, k    = rotated by their positions, if the encoder has rotary positions
    out     = LayerNorm(varlen_attention(q, k, v) Wo^T + bo + residual)

The sum and the norm are those of :func:`moe_fast.ops.add_norm`, with its float32 residual.

Backend ``cpp`` (kernels/csrc/cpu/attention_block.cpp) computes a few sequences at a time, so that
what lies between x and out stays in the cache. It reads the weights as they are in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.add_norm import Normed, check_block_end
from moe_fast.ops.attention_block import cpp, reference  # noqa: F401 - each registers itself
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    check_count,
    check_dtype,
    check_like,
    check_shape,
    check_starts,
    wants_gradients,
)

_BIASES = ("query_bias", "key_bias", "value_bias", "output_bias")


class Projections(NamedTuple):
    """The linear maps of an attention, N = heads * head_dim.

    Attributes:
        query, key, value: weights [N, D].
        output: weight [D, N].
        query_bias, key_bias, value_bias: [N] or ``None``.
        output_bias: [D] or ``None``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    output_bias: Tensor | None


def attention_block(
    x: Tensor,
    residual: Tensor,
    projections: Projections,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    heads: int,
    rotation: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    window: int | None = None,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Normed:
    """Compute the attention block of a layer; see the module's docstring.

    Args:
        x: [T, D].
        residual: [T, D], in x's dtype or float32.
        projections: the weights, in x's dtype.
        norm_weight, norm_bias: [D]; LayerNorm's gamma and beta (``None`` for zeros).
        cu_seqlens, scale, window: as in :func:`moe_fast.ops.varlen_attention`.
        heads: the number of heads.
        rotation: the cosines and sines [T, head_dim] of rotary positions, in x's dtype or float32,
            whose pairs are the elements i and i + head_dim / 2.
        eps: is added to the variance.
        backend: see :func:`moe_fast.use_backend`. If gradients are needed, PyTorch runs the call.

    Returns:
        [T, D] in x's dtype, and before rounding, as :func:`moe_fast.ops.add_norm`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; on the CPU (elsewhere with
            ``MOE_FAST_CHECK=1``) also for ``cu_seqlens`` that do not rise from 0 to T.
    """
    cos, sin = rotation or (None, None)
    block = (norm_weight, norm_bias)
    run = _prepare(x, residual, *projections, *block, cu_seqlens, cos, sin, heads, window, backend)
    if not torch.compiler.is_compiling():
        check_starts(cu_seqlens, x.shape[0])
    scale = (projections.query.shape[0] // heads) ** -0.5 if scale is None else float(scale)
    settings = (heads, scale, window, eps)
    out, exact = run(x, residual, *projections, *block, cu_seqlens, cos, sin, *settings)
    return Normed(out, exact if exact.shape == out.shape else out)


@once_per_signature
def _prepare(x: Tensor, residual: Tensor, *arguments: Any) -> Callable:
    """Check the arguments and return the implementation to run."""
    *weights, norm_weight, norm_bias, cu_seqlens, cos, sin, heads, window, backend = arguments
    projections = Projections(*weights)
    check_shape("x", x, (None, None), "[T, D]")
    check_dtype("x", x, FLOAT_DTYPES)
    check_count("heads", heads)
    _check_projections(x, projections, heads)
    check_block_end(x, residual, norm_weight, norm_bias)
    check_dtype("cu_seqlens", cu_seqlens, INTEGER_DTYPES)
    check_shape("cu_seqlens", cu_seqlens, (None,), "[B + 1]")
    if window is not None and window < 0:
        raise ValueError(f"window must not be negative; got {window}.")
    if (cos is None) != (sin is None):
        raise ValueError("rotation must be None, or cosines and sines; got one of them.")
    if cos is not None:
        _check_rotation(x, cos, sin, projections.query.shape[0] // heads)
    check_like("x", x, dtype=False, cu_seqlens=cu_seqlens, cos=cos, sin=sin)
    return backends.select(
        "attention_block",
        backend,
        x.device,
        x.dtype,
        gradients=wants_gradients(x, residual, *projections, norm_weight, norm_bias, cos, sin),
    )


def _check_projections(x: Tensor, projections: Projections, heads: int) -> None:
    check_shape("query", projections.query, (None, x.shape[1]), "[N, D]")
    inner = projections.query.shape[0]
    if inner % heads:
        raise ValueError(f"query must have a multiple of heads = {heads} rows; got {inner}.")
    for name in ("key", "value"):
        check_shape(name, getattr(projections, name), (inner, x.shape[1]), "[N, D]")
    check_shape("output", projections.output, (x.shape[1], inner), "[D, N]")
    for name in _BIASES:
        bias = getattr(projections, name)
        size = x.shape[1] if name == "output_bias" else inner
        if bias is not None:
            check_shape(name, bias, (size,), "[D]" if name == "output_bias" else "[N]")
    names = ("query", "key", "value", "output", *_BIASES)
    check_like("x", x, True, **dict(zip(names, projections, strict=True)))


def _check_rotation(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for a rotation; got {head_dim}.")
    for name, tensor in (("cosines", cos), ("sines", sin)):
        check_shape(name, tensor, (x.shape[0], head_dim), "[T, head_dim]")
        check_dtype(name, tensor, (x.dtype, torch.float32))
    check_like("cosines", cos, sines=sin)
