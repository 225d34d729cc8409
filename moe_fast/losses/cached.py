"""Computes a loss over a batch of any size in the memory of one chunk (a gradient cache)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses.base import Columns, EmbeddingLoss
from moe_fast.losses.chunk_budget import (
    ChunkProbe,
    choose_tokens_per_chunk,
    most_over_processes,
    warn_if_slow,
)
from moe_fast.losses.chunked_encoding import encode_in_chunks, forwards_together
from moe_fast.losses.citations import citation_of
from moe_fast.losses.router import RouterLoss
from moe_fast.losses.routing_record import hook_routers
from moe_fast.losses.routing_replay import hook_choices
from moe_fast.losses.text_chunks import (
    Chunk,
    TextLengths,
    cut_by_length,
    split_into,
    text_lengths,
)
from moe_fast.ops.checks import check_count

logger = logging.getLogger(__name__)

# Tokens per chunk in evaluation before any training. Without a graph a chunk needs little memory.
_UNMEASURED = 4096


class CachedLoss(nn.Module):
    """Computes a loss, with the whole batch's gradient, in chunks of the batch (a gradient cache).

    The texts are sorted by length and encoded in chunks, without a graph; then the loss is computed
    from all embeddings. The backward pass encodes each chunk once more, with a graph, and
    propagates the chunk's part of the gradient. The second forward costs about a third of the step;
    in return, texts of unequal lengths are hardly padded. Autocast, gradient scaling and
    accumulation, gradient checkpointing, ``DistributedDataParallel`` (which averages once, with the
    last chunk) and parameters of the loss itself are supported. A fully sharded model gathers its
    weights for each chunk: all processes cut their batches into equally many chunks, and
    ``tokens_per_chunk`` must be given.

    The routers of a mixture of experts repeat, in the second forward, their choices of the first.
    The router losses are those of the whole batch over all processes, because they are functions of
    sums over tokens, to which every chunk adds its part.

    Without dropout the result equals the wrapped loss up to rounding. With dropout other masks of
    the same distribution are drawn, because the chunks are other batches. Gradients are added to
    ``.grad``: call ``backward``, not ``torch.autograd.grad``.

    Columns and labels are those of the wrapped loss.

    Args:
        loss: any loss of this package over embeddings, or :class:`moe_fast.losses.RouterLoss`
            around one.
        tokens_per_chunk: how many tokens, padding included, are encoded at once; the only setting
            for memory. A longer text is a chunk of its own. ``None``: the size is chosen on the
            first training batch, by measuring. It is then logged, and saved with the trainer's
            checkpoints. If a given size turns out to be slow, a warning is logged.

    Attributes:
        last_metrics: those of the wrapped loss, and ``padding_avoided``: the share of the batch's
            padding that the chunks leave out (absent if the batch has no padding).

    Raises:
        TypeError: ``loss`` is not one of the losses above.
        ValueError: ``tokens_per_chunk`` is below 1.
    """

    uses_gradient_cache = True
    citation = citation_of("gao2021scaling")
    chosen_tokens_per_chunk: Tensor | None

    def __init__(
        self, loss: EmbeddingLoss | RouterLoss, *, tokens_per_chunk: int | None = None
    ) -> None:
        super().__init__()
        inner = loss.loss if isinstance(loss, RouterLoss) else loss
        if not isinstance(inner, EmbeddingLoss):
            raise TypeError(
                "loss must be a loss of moe_fast over embeddings (InfoNCELoss, SigmoidLoss, ...), "
                f"or RouterLoss around one; got {_described(loss)}. For a loss of "
                "sentence-transformers take its own cached form."
            )
        if tokens_per_chunk is not None:
            check_count("tokens_per_chunk", tokens_per_chunk)
        self.loss = loss
        self.last_metrics: dict[str, Tensor] = {}
        self._given = tokens_per_chunk
        self._checked = False
        chosen = torch.zeros((), dtype=torch.int64) if tokens_per_chunk is None else None
        self.register_buffer("chosen_tokens_per_chunk", chosen)
        hook_routers(self.model)  # before a first run under torch.compile
        hook_choices(self.model)

    @property
    def model(self) -> nn.Module:
        """The encoder of the wrapped loss."""
        return self.loss.model  # type: ignore[return-value]

    @property
    def tokens_per_chunk(self) -> int | None:
        """The size in use; ``None`` until it has been chosen."""
        if self.chosen_tokens_per_chunk is None:
            return self._given
        return int(self.chosen_tokens_per_chunk) or None

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Any = None) -> Tensor:
        """Compute the loss of one batch.

        Args:
            sentence_features, labels: as the wrapped loss takes them. Texts are padded, or packed
                with ``cu_seq_lens_q``.

        Returns:
            [] with the dtype of the wrapped loss.

        Raises:
            ValueError: the wrapped loss refuses the columns or labels (checked before anything is
                encoded), a column's features are not texts, a column is empty, or the model is
                fully sharded and ``tokens_per_chunk`` is not given.
        """
        columns = list(sentence_features)
        loss, router_loss = self._parts()
        loss.check_columns(columns, labels)
        if router_loss is not None:
            router_loss.check_domain_ids(columns)
        chunks = self._cut(columns)
        embeddings, sums = encode_in_chunks(loss, router_loss, columns, chunks)
        value = loss.from_embeddings(embeddings, columns, labels)
        if router_loss is not None:
            value = value + router_loss.from_statistics(sums)
        self.last_metrics = (router_loss or loss).last_metrics | self.last_metrics
        return value

    def _parts(self) -> tuple[EmbeddingLoss, RouterLoss | None]:
        """Return the loss over embeddings, and the router loss if it has a nonzero coefficient."""
        if not isinstance(self.loss, RouterLoss):
            return self.loss, None
        in_use = any(self.loss.coefficients.values())
        return self.loss.loss, self.loss if in_use else None  # type: ignore[return-value]

    def _cut(self, columns: Columns) -> list[Chunk]:
        """Cut the batch into chunks; sets ``last_metrics`` to the share of padding avoided."""
        lengths = [text_lengths(column) for column in columns]
        if not all(len(of.tokens) for of in lengths):
            raise ValueError(
                "every column must hold at least one text; got "
                f"{[len(of.tokens) for of in lengths]}."
            )
        device = next(v.device for v in columns[0].values() if isinstance(v, Tensor))
        size = self._size(columns, lengths, device)
        longest = max(int(of.widths.max()) for of in lengths)
        if longest > size and not self._checked:
            logger.warning(
                "CachedLoss: a text has %d tokens, more than tokens_per_chunk=%d: it is a chunk "
                "of its own.",
                longest,
                size,
            )
        self._checked = self._checked or torch.is_grad_enabled()
        chunks = cut_by_length(lengths, size, device)
        if forwards_together(self.model):
            chunks = split_into(chunks, most_over_processes(len(chunks), device))
        self.last_metrics = _padding_avoided(lengths, chunks)
        return chunks

    def _size(self, columns: Columns, lengths: Sequence[TextLengths], device: torch.device) -> int:
        """Return ``tokens_per_chunk``; the first training batch chooses it or times a given one."""
        known = self.tokens_per_chunk
        if not (torch.is_grad_enabled() and self.model.training) or self._checked:
            return known or _UNMEASURED
        if forwards_together(self.model):  # measuring would leave the other processes waiting
            if known is None:
                raise ValueError(
                    "tokens_per_chunk must be given for a fully sharded model, whose forwards all "
                    "processes run together; got None."
                )
            return known
        probe = ChunkProbe(self.model, self._encode, columns, lengths, device)
        if known is None:
            assert self.chosen_tokens_per_chunk is not None  # else one was given
            self.chosen_tokens_per_chunk.fill_(choose_tokens_per_chunk(probe))
        elif self._given is not None:
            warn_if_slow(probe, known)
        return self.tokens_per_chunk or _UNMEASURED

    def _encode(self, features: Mapping[str, Any]) -> Tensor:
        return self._parts()[0].embed_columns([features])[0]

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        return {"loss": type(self.loss).__name__, "tokens_per_chunk": self.tokens_per_chunk}


def _described(loss: Any) -> str:
    name = type(loss).__name__
    return f"{name} around {type(loss.loss).__name__}" if isinstance(loss, RouterLoss) else name


def _padding_avoided(lengths: Sequence[TextLengths], chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """Return the share of the batch's padding that the chunks leave out; {} without padding."""
    real = sum(int(of.tokens.sum()) for of in lengths)
    padding = sum(of.padded for of in lengths) - real
    if not padding:
        return {}
    left = sum(len(chunk.rows) * chunk.width for chunk in chunks) - real
    return {"padding_avoided": torch.tensor(1 - left / padding)}
