"""Cuts a batch's text columns into chunks of a bounded number of tokens, by length.

The texts of a chunk are of one column and of similar length, so that there is hardly any padding.
The longest come first, so that a chunk that does not fit in memory fails at once. A chunk holds the
numbers of its rows in the batch; labels and ids stay in the order of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Features = Mapping[str, Any]

_STARTS = "cu_seq_lens_q"  # sentence-transformers' packed features have it
_STARTS_KEYS = (_STARTS, "cu_seq_lens_k")
_LONGEST_KEYS = ("max_length_q", "max_length_k")


@dataclass(frozen=True)
class Chunk:
    """Some rows of one text column.

    Attributes:
        column: the number of the column.
        rows: [n] int64 on the features' device.
        width: the width of its longest text (see :class:`TextLengths`).
    """

    column: int
    rows: Tensor
    width: int


@dataclass(frozen=True)
class TextLengths:
    """The lengths of the B texts of a column.

    Attributes:
        tokens: [B] int64 on the CPU, the number of real tokens.
        widths: [B] int64 on the CPU, the number of tokens up to the last real one; it includes
            padding on the left.
        padded: the number of tokens of the whole column as it was given, padding included.
    """

    tokens: Tensor
    widths: Tensor
    padded: int


def text_lengths(features: Features) -> TextLengths:
    """Return the lengths of a column's texts, padded or packed.

    Raises:
        ValueError: the features are not texts.
    """
    if _STARTS in features:
        tokens = features[_STARTS].diff().to("cpu", torch.int64)
        return TextLengths(tokens, tokens, int(tokens.sum()))
    ids, mask = features.get("input_ids"), features.get("attention_mask")
    like = ids if mask is None else mask
    if not isinstance(like, Tensor) or like.dim() != 2:
        raise ValueError(
            "a gradient cache needs columns of texts, with input_ids or attention_mask [B, L] or "
            f"with {_STARTS}; got features {sorted(features)}."
        )
    if mask is None:
        mask = torch.ones_like(like)
    real = mask != 0
    places = torch.arange(1, real.shape[1] + 1, device=real.device)
    widths = (real * places).amax(1) if real.shape[1] else real.sum(1)
    tokens, widths = torch.stack((real.sum(1), widths)).cpu()
    return TextLengths(tokens, widths, mask.numel())


def cut_by_length(
    lengths: Sequence[TextLengths], tokens_per_chunk: int, device: torch.device
) -> list[Chunk]:
    """Cut all texts into chunks of at most ``tokens_per_chunk`` tokens, padding included.

    A text that is longer than that is a chunk of its own.

    Args:
        lengths: one per column.
        tokens_per_chunk: at least 1.
        device: the device of the chunks' rows.
    """
    chunks = []
    for column, of in enumerate(lengths):
        order = of.widths.argsort(descending=True, stable=True)
        widths = of.widths[order].clamp(min=1).tolist()
        start = 0
        while start < len(order):
            size = max(1, tokens_per_chunk // widths[start])
            rows = order[start : start + size].to(device)
            chunks.append(Chunk(column, rows, widths[start]))
            start += size
    return chunks


def split_into(chunks: Sequence[Chunk], number: int) -> list[Chunk]:
    """Halve the chunks with most texts until there are ``number`` chunks.

    Chunks that are already as many, or more, stay as they are.

    Raises:
        ValueError: there are fewer texts than that.
    """
    chunks = list(chunks)
    while len(chunks) < number:
        place = max(range(len(chunks)), key=lambda i: len(chunks[i].rows))
        whole = chunks[place]
        half = len(whole.rows) // 2
        if not half:
            raise ValueError(
                f"a batch of {len(chunks)} texts cannot be cut into {number} chunks, as many as "
                "another process has; leave the last, incomplete batch out (dataloader_drop_last)."
            )
        parts = (whole.rows[:half], whole.rows[half:])
        chunks[place : place + 1] = [replace(whole, rows=rows) for rows in parts]
    return chunks


def take_rows(features: Features, chunk: Chunk) -> dict[str, Any]:
    """Return the chunk's part of its column's features; values without rows are passed on.

    Raises:
        ValueError: a tensor has neither one entry per text nor one per token.
    """
    if _STARTS in features:
        return _take_packed(features, chunk.rows)
    like = features.get("attention_mask")
    batch, length = (features["input_ids"] if like is None else like).shape
    taken: dict[str, Any] = {}
    for key, value in features.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            taken[key] = value
            continue
        if value.shape[0] != batch:
            raise ValueError(_no_rows(key, value, batch))
        per_token = value.dim() > 1 and value.shape[1] == length
        taken[key] = value[chunk.rows, : chunk.width] if per_token else value[chunk.rows]
    return taken


def _take_packed(features: Features, rows: Tensor) -> dict[str, Any]:
    """Take ``rows`` from texts that are packed one after the other, and pack them again."""
    starts = features[_STARTS].to(torch.int64)
    lengths = starts.diff()[rows]
    ends = lengths.cumsum(0)
    sentence = torch.arange(len(rows), device=starts.device).repeat_interleave(lengths)
    token = torch.arange(len(sentence), device=starts.device)
    token = token - (ends - lengths)[sentence] + starts[rows][sentence]
    batch, total = len(starts) - 1, features["input_ids"].shape[-1]
    taken: dict[str, Any] = {}
    for key, value in features.items():
        if key in _STARTS_KEYS:
            taken[key] = torch.cat((ends.new_zeros(1), ends)).to(value.dtype)
        elif key in _LONGEST_KEYS:
            taken[key] = int(lengths.max())
        elif key == "seq_idx":
            taken[key] = sentence.to(value.dtype).view(*value.shape[:-1], -1)
        elif not isinstance(value, Tensor) or value.dim() == 0:
            taken[key] = value
        elif value.shape[0] == batch:
            taken[key] = value[rows]
        elif value.shape[-1] == total:
            taken[key] = value[..., token]
        else:
            raise ValueError(_no_rows(key, value, batch))
    return taken


def _no_rows(key: str, value: Tensor, batch: int) -> str:
    return (
        f"a gradient cache cannot cut {key!r} of shape {list(value.shape)} into the {batch} texts "
        "of its column."
    )
