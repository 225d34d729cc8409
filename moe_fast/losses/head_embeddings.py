"""The outputs of three heads for the texts of a column, packed, and how chunks of them are joined.

A column of B texts has T tokens that count for the sparse score and M vectors in all. They follow
one another without padding, text after text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops.checks import compute_dtype

# What an encoder must add to the features for these losses, see moe_fast.encoding.three_heads.
NEEDED = ("sentence_embedding", "token_logits", "lexical_mask", "multi_vectors")


@dataclass(frozen=True)
class HeadEmbeddings:
    """Outputs of B texts.

    Attributes:
        dense: [B, d], normalised.
        logits: [T], the sparse head's output before its positive part is taken.
        vectors: [M, D'], normalised.
        ids: [T] int64, the tokens' vocabulary ids.
        token_starts, vector_starts: [B + 1] int64, where each text's tokens and vectors begin.
    """

    dense: Tensor
    logits: Tensor
    vectors: Tensor
    ids: Tensor
    token_starts: Tensor
    vector_starts: Tensor

    def __len__(self) -> int:
        return len(self.token_starts) - 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The three tensors that have gradients."""
        return self.dense, self.logits, self.vectors

    def with_tensors(self, tensors: Sequence[Tensor]) -> HeadEmbeddings:
        """The same texts with other values of :attr:`tensors`."""
        dense, logits, vectors = tensors
        return replace(self, dense=dense, logits=logits, vectors=vectors)

    def rows_of(self, grads: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Take the entries of some texts, ``rows`` [n], from gradients of :attr:`tensors`."""
        dense, logits, vectors = grads
        return [
            dense[rows],
            logits[entries_of(self.token_starts, rows)],
            vectors[entries_of(self.vector_starts, rows)],
        ]


def entries_of(starts: Tensor, rows: Tensor) -> Tensor:
    """Return the places of the entries of some texts, text after text.

    Args:
        starts: [B + 1] int64, where each text's entries begin.
        rows: [n] int64, the texts.
    """
    lengths = starts.diff()[rows]
    ends = lengths.cumsum(0)
    entry = torch.arange(int(ends[-1]) if len(ends) else 0, device=starts.device)
    return entry + (starts[rows] - (ends - lengths)).repeat_interleave(lengths)


def starts_of(lengths: Tensor) -> Tensor:
    """Return where texts of these lengths [B] begin, [B + 1] int64; the last is their sum."""
    return F.pad(lengths.to(torch.int64).cumsum(0), (1, 0))


def head_embeddings(features: Mapping[str, Any], encoder: Any) -> HeadEmbeddings:
    """Pack what an encoder with three heads gave for a batch of texts, padded or packed.

    Raises:
        TypeError: the encoder (named in the message) has no such heads.
    """
    missing = [name for name in NEEDED if name not in features]
    if missing:
        raise TypeError(
            f"the model must have three heads, such as one made by moe_fast.add_three_heads; the "
            f"features of {type(encoder).__name__} lack {', '.join(missing)}."
        )
    tokens, vectors = features["lexical_mask"], features["multi_vector_mask"]
    starts = features.get("cu_seq_lens_q")
    dense = features["sentence_embedding"]
    return HeadEmbeddings(
        dense=F.normalize(dense.to(compute_dtype(dense.dtype)), dim=-1),
        logits=features["token_logits"][tokens],
        vectors=features["multi_vectors"][vectors],
        ids=features["input_ids"][tokens].to(torch.int64),
        token_starts=_starts(tokens, starts),
        vector_starts=_starts(vectors, starts),
    )


def _starts(mask: Tensor, packed_starts: Tensor | None) -> Tensor:
    """Where each text's marked entries begin among all marked ones, [B + 1]."""
    if packed_starts is None:
        return starts_of(mask.sum(1))
    return F.pad(mask.flatten().cumsum(0), (1, 0))[packed_starts.to(torch.int64)]


def join(parts: list[HeadEmbeddings], rows: Sequence[Tensor]) -> HeadEmbeddings:
    """Join chunks of a column to the whole column.

    Args:
        parts: the chunks; the list is emptied, so that each is freed once it is copied.
        rows: the texts of each chunk, int64; together 0 .. B - 1.
    """
    order = torch.cat(list(rows)).argsort()
    lengths = [
        starts_of(torch.cat([getattr(part, name).diff() for part in parts])[order])
        for name in ("token_starts", "vector_starts")
    ]
    token_starts, vector_starts = lengths
    first = parts[0]
    whole = HeadEmbeddings(
        dense=first.dense.new_empty(len(order), *first.dense.shape[1:]),
        logits=first.logits.new_empty(int(token_starts[-1])),
        vectors=first.vectors.new_empty(int(vector_starts[-1]), *first.vectors.shape[1:]),
        ids=first.ids.new_empty(int(token_starts[-1])),
        token_starts=token_starts,
        vector_starts=vector_starts,
    )
    del first
    for here in reversed(rows):
        part = parts.pop()
        tokens = entries_of(token_starts, here)
        whole.dense[here] = part.dense
        whole.logits[tokens] = part.logits
        whole.ids[tokens] = part.ids
        whole.vectors[entries_of(vector_starts, here)] = part.vectors
        del part
    return whole
