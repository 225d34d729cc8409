"""The attention function "moe_fast", registered with transformers: attention without padding.

All of transformers' encoders accept it (``attn_implementation="moe_fast"``). It computes a packed
batch, hidden states [1, T, D] with ``cu_seq_lens_q`` among the keywords, without change; it packs a
padded batch with a 2-D mask for the attention alone. The mixtures of :mod:`moe_fast.models` pack
the batch for the whole forward instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from moe_fast import compat, ops

ATTENTION = "moe_fast"
_sdpa_attention = compat.sdpa_attention()


_choice: ContextVar[str | None] = ContextVar("moe_fast_attention", default=None)


@contextmanager
def packed_attention() -> Iterator[None]:
    """Makes "moe_fast" the attention of all mixtures, within the block and in this thread alone."""
    if not compat.attention_can_be_chosen():
        yield
        return
    token = _choice.set(ATTENTION)
    try:
        yield
    finally:
        _choice.reset(token)


class AttentionOfTheCall:
    """A configuration whose attention a single forward can choose, see `packed_attention`.

    transformers' layers and masks read the name of the attention from the configuration, which all
    threads share; no argument of a forward can change it.
    """

    _attn_implementation = compat.attention_setting(_choice)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Self-attention of an encoder, as transformers calls it.

    Args:
        query, key, value: [B, heads, L, head_dim]; packed: [1, heads, T, head_dim]. Keys and values
            may have fewer heads, each of which serves several heads of the queries.
        attention_mask: ``None``, [B, L] bool (True for real tokens), or a 4-D mask, for which
            transformers' SDPA is called.
        sliding_window: as FlashAttention counts it: a token attends to ``sliding_window - 1``
            others on either side.
        cu_seq_lens_q, max_length_q: [B + 1] starts and the longest length of a packed batch.

    Returns:
        [B, L, heads, head_dim], zero for padding, and no attention weights.

    Raises:
        ValueError: for causal attention, cross-attention and ``output_attentions=True``.
    """
    _refuse(module, query, key, kwargs)
    options: dict[str, Any] = {
        "scale": scaling,
        "dropout": dropout,
        "max_length": max_length_q,
        "window": None if sliding_window is None else sliding_window - 1,
    }
    if attention_mask is not None and attention_mask.dim() == 4 and cu_seq_lens_q is None:
        return _sdpa_attention(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=False
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # each head of keys serves several heads of queries
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if cu_seq_lens_q is not None:
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        return ops.varlen_attention(q, k, v, cu_seq_lens_q, **options)[None], None
    batch, heads, length, dim = query.shape
    real, starts = real_tokens(attention_mask, batch, length, query.device)
    q, k, v = (pick(t.transpose(1, 2).flatten(0, 1), real) for t in (query, key, value))
    y = scatter_rows(ops.varlen_attention(q, k, v, starts, **options), real, batch * length)
    return y.view(batch, length, heads, dim), None


def _refuse(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
    given = None
    if getattr(module, "is_causal", False) or kwargs.get("is_causal"):
        given = "causal attention"
    elif key.shape != (query.shape[0], key.shape[1], *query.shape[2:]) or (
        query.shape[1] % key.shape[1]
    ):
        given = f"cross-attention (query {list(query.shape)}, key {list(key.shape)})"
    elif kwargs.get("output_attentions"):
        given = "output_attentions=True"
    if given is not None:
        raise ValueError(
            f"attn_implementation={ATTENTION!r} is for encoders' self-attention and returns no "
            f"attention weights; got {given}. Use 'eager' or 'sdpa'."
        )


def real_tokens(
    mask: Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """The positions of a padded batch's real tokens.

    Args:
        mask: [B, L] bool, or ``None``: all are real.

    Returns:
        Their indices in [B * L], [T] int64 (``None`` if all are real), and [B + 1] int32, the
        starts of the packed sequences.
    """
    if mask is None or bool(mask.all()):
        return None, torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    starts = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    starts[1:] = mask.sum(1).cumsum(0)
    return mask.flatten().nonzero().squeeze(1), starts


def pick(x: Tensor, places: Tensor | None) -> Tensor:
    """Rows of x [B * L, ...] at ``places``."""
    return x if places is None else x.index_select(0, places)


def scatter_rows(x: Tensor, places: Tensor | None, size: int) -> Tensor:
    """Write row t of x [T, ...] to row ``places[t]`` of a new tensor [size, ...] of zeros.

    No place may occur twice. This undoes :func:`pick`, which takes the rows at ``places``.
    """
    if places is None:
        return x
    return x.new_zeros(size, *x.shape[1:]).index_copy(0, places, x)


AttentionInterface.register(ATTENTION, attention_forward)
# [B, L], or None if all tokens are real: no mask of L x L is made, not even for windows.
AttentionMaskInterface.register(ATTENTION, compat.padding_mask())
