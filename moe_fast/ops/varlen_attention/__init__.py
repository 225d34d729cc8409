"""varlen_attention: every token of a packed batch attends to the tokens of its own sequence.

    y_i = sum over j of softmax_j(scale * q_i . k_j) v_j,   j in i's sequence and |i - j| <= window

Sequences follow one another without padding; ``cu_seqlens`` holds their starts. Backend ``cpp`` is
a forward pass on the CPU, for inference (kernels/csrc/cpu/attention.cpp). Backend ``torch`` has no
kernel of its own; it chooses among kernels that others maintain:

    cuda, float16 and bfloat16, no dropout   torch.nn.attention.varlen.varlen_attn (head_dim a
                                             multiple of 8, at most 256; capability 8.0)
    cuda, otherwise, if it is installed      xformers.ops.memory_efficient_attention (no window)
    everywhere else                          F.scaled_dot_product_attention, once for each run of
                                             neighbouring sequences of equal length

docs/packed.md has the measurements behind the choice on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checked_calls import once_per_signature
from moe_fast.ops.checks import (
    FLOAT_DTYPES,
    INTEGER_DTYPES,
    autocast_dtype,
    autocast_to,
    check_dtype,
    check_like,
    check_shape,
    check_starts,
    wants_gradients,
)
from moe_fast.ops.varlen_attention import cpp, maintained  # noqa: F401 - each registers itself


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    max_length: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute attention within each sequence of a packed batch; see the module's docstring.

    Args:
        query, key, value: [T, heads, head_dim].
        cu_seqlens: [B + 1] int32 or int64, the starts of the sequences; the first is 0, the last T.
            Sequences may be empty.
        scale: the factor on the scores; ``None``: 1 / sqrt(head_dim).
        window: how many tokens to either side a token attends to; ``None``: its whole sequence.
        dropout: the probability of dropping an attention weight.
        max_length: the length of the longest sequence, if it is known; this saves a synchronisation
            on a GPU.
        backend: see :func:`moe_fast.use_backend`. If gradients or dropout are needed, a default of
            ``"cpp"`` runs ``torch``.

    Returns:
        [T, heads, head_dim] in the query's dtype (autocast's under autocast), with gradients for
        query, key and value.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit; on the CPU (elsewhere with
            ``MOE_FAST_CHECK=1``) also for ``cu_seqlens`` that do not rise from 0 to T.
        ValueError: ``backend="cpp"`` is given, and dropout or gradients are needed.
    """
    run = _prepare(query, key, value, cu_seqlens, window, dropout > 0, backend)
    if not torch.compiler.is_compiling():
        check_starts(cu_seqlens, query.shape[0])
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = autocast_to(query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return run(query, key, value, cu_seqlens, scale, window, dropout, max_length)


@once_per_signature
def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    window: int | None,
    drops: bool,
    backend: str | None,
) -> Callable:
    """Check the arguments and return the implementation to run."""
    letters = "[T, heads, head_dim]"
    check_shape("query", query, (None, None, None), letters)
    check_shape("key", key, tuple(query.shape), letters)
    check_shape("value", value, tuple(query.shape), letters)
    check_dtype("query", query, FLOAT_DTYPES)
    check_like("query", query, key=key, value=value)
    check_like("query", query, dtype=False, cu_seqlens=cu_seqlens)
    check_dtype("cu_seqlens", cu_seqlens, INTEGER_DTYPES)
    check_shape("cu_seqlens", cu_seqlens, (None,), "[B + 1]")
    if window is not None and window < 0:
        raise ValueError(f"window must not be negative; got {window}.")
    return backends.select(
        "varlen_attention",
        backend,
        query.device,
        autocast_dtype(query),
        gradients=wants_gradients(query, key, value),
        dropout=drops,
    )
