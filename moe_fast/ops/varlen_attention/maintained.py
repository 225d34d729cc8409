"""varlen_attention by kernels that PyTorch and xformers maintain: chooses one and calls it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import backends

_HALF = (torch.float16, torch.bfloat16)
_QUERIES_AT_ONCE = 512  # with a window: a long sequence then needs no mask of length x length


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    dropout: float,
    max_length: int | None,
) -> Tensor:
    kernel = attention_kernel(query.device.type, query.dtype, window, dropout, query.shape[-1])
    if kernel == "varlen_attn":
        from torch.nn.attention.varlen import varlen_attn

        starts = cu_seqlens.to(torch.int32)
        longest = int(starts.diff().max()) if max_length is None else max_length
        around = (-1, -1) if window is None else (window, window)
        lengths = (starts, starts, longest, longest)
        y = varlen_attn(query, key, value, *lengths, scale=scale, window_size=around)
        assert isinstance(y, Tensor)
        return y
    if kernel == "xformers":
        from xformers.ops import fmha, memory_efficient_attention

        mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(cu_seqlens.diff().tolist())
        batched = (t[None] for t in (query, key, value))
        return memory_efficient_attention(*batched, attn_bias=mask, p=dropout, scale=scale)[0]
    return _by_runs(query, key, value, cu_seqlens, scale, window, dropout)


def attention_kernel(
    device_type: str,
    dtype: torch.dtype,
    window: int | None = None,
    dropout: float = 0.0,
    head_dim: int = 64,
) -> str:
    """Return the kernel that backend ``torch`` runs: "varlen_attn", "xformers" or "sdpa"."""
    if device_type != "cuda":
        return "sdpa"
    if dtype in _HALF and not dropout and head_dim % 8 == 0 and head_dim <= 256 and _has_varlen():
        return "varlen_attn"
    if dtype != torch.float64 and window is None and _has("xformers"):
        return "xformers"
    return "sdpa"


def describe_attention(device_type: str) -> str:
    """Describe, for users, what backend ``torch`` runs on a device type."""
    by_runs = "SDPA per run of equal lengths"
    if device_type != "cuda":
        return by_runs
    varlen = "varlen_attn (float16, bfloat16, no dropout)"
    others = "xformers (no window)"
    return "; ".join(
        (
            varlen if _has_varlen() else "no varlen_attn in this torch or on this GPU",
            others if _has("xformers") else "xformers is not installed",
            f"else {by_runs}",
        )
    )


@cache
def _has_varlen() -> bool:
    """Whether varlen_attn can run: its FlashAttention needs compute capability 8.0."""
    return _has("torch.nn.attention.varlen") and torch.cuda.get_device_capability() >= (8, 0)


@cache
def _has(module: str) -> bool:
    return find_spec(module) is not None


# --- by runs of equal length -------------------------------------------------------------


@torch.compiler.disable  # it reads the lengths: a graph would be right for one batch only
def _by_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    runs = list(equal_runs(cu_seqlens.tolist()))
    if not runs:
        return query * 0  # no tokens; keeps the graph
    sizes = [count * length for count, length in runs]
    # split instead of slices: the backward of a slice writes a gradient of the whole batch.
    parts = zip(*(t.split(sizes) for t in (query, key, value)), runs, strict=True)
    outputs = []
    for q, k, v, (count, length) in parts:
        shape = (count, length, *q.shape[1:])
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        if window is None or window >= length - 1:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
        else:
            y = _windowed(q, k, v, scale, window, dropout)
        outputs.append(y.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def equal_runs(starts: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (number, length) of each run of neighbouring sequences of equal length, except 0."""
    lengths = (end - start for start, end in zip(starts, starts[1:], strict=False))
    for length, run in groupby(n for n in lengths if n):
        yield len(list(run)), length


def _windowed(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, dropout: float) -> Tensor:
    """Attend within a window, [n, heads, L, head_dim], by blocks of queries and their keys."""
    length = q.shape[2]
    outputs = []
    for first in range(0, length, _QUERIES_AT_ONCE):
        last = min(first + _QUERIES_AT_ONCE, length)
        low, high = max(first - window, 0), min(last + window, length)
        rows = torch.arange(first, last, device=q.device)[:, None]
        columns = torch.arange(low, high, device=q.device)
        y = F.scaled_dot_product_attention(
            q[:, :, first:last],
            k[:, :, low:high],
            v[:, :, low:high],
            attn_mask=(rows - columns).abs() <= window,
            dropout_p=dropout,
            scale=scale,
        )
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


backends.register("varlen_attention", "torch", _attention, note=describe_attention)
