"""A gradient cache: a loss over a batch of any size, in the memory of a chunk."""

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

_UNMEASURED = 4096  # in evaluation before any training; without a graph it takes little memory


class CachedLoss(nn.Module):
    """A loss whose batch does not have to fit in memory: its gradient is that of the whole batch.

    The texts are encoded in chunks, sorted by length, without a graph; the loss is that of all
    embeddings; its backward pass encodes each chunk once more, with a graph, and hands it its part
    of the gradient. That costs a second forward, about a third of the step, and saves the padding
    between texts of unequal lengths. It works under autocast, gradient scaling and accumulation,
    gradient checkpointing and ``DistributedDataParallel`` (which averages once, with the last
    chunk), and with parameters of the loss's own. Fully sharded models gather their weights for
    each chunk: there every process cuts its batch into as many, and ``tokens_per_chunk`` must be
    given.

    A mixture of experts makes, in the second forward, the routing choices of the first. The router
    losses are those of the whole batch, of all processes: they are functions of sums over tokens,
    to which every chunk brings its part.

    Equal to the wrapped loss to rounding where dropout is off; with dropout it draws other masks
    of the same distribution, since the chunks are other batches. Gradients are added to ``.grad``:
    call ``backward``, not ``torch.autograd.grad``.

    Columns and labels: the wrapped loss's.

    Args:
        loss: any loss of this package over embeddings, or :class:`moe_fast.losses.RouterLoss`
            around one.
        tokens_per_chunk: the one setting for memory: how many tokens, padding included, are
            encoded at once; a longer text is a chunk of its own. ``None``: chosen on the first
            batch in training, by measuring; the choice is logged, and saved with the trainer's
            checkpoints. Where a size that is given proves slow, the log says so.

    Attributes:
        last_metrics: the wrapped loss's and ``padding_avoided``, the share of the batch's padding
            that the chunks do not have (where it has any).

    Raises:
        TypeError: another loss.
        ValueError: ``tokens_per_chunk`` below 1.
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
        """The wrapped loss's encoder."""
        return self.loss.model  # type: ignore[return-value]

    @property
    def tokens_per_chunk(self) -> int | None:
        """The size in use; ``None`` until it is chosen."""
        if self.chosen_tokens_per_chunk is None:
            return self._given
        return int(self.chosen_tokens_per_chunk) or None

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Any = None) -> Tensor:
        """The loss of one batch.

        Args:
            sentence_features, labels: as the wrapped loss wants them; padded, or packed with
                ``cu_seq_lens_q``.

        Returns:
            [] as the wrapped loss.

        Raises:
            ValueError: what the wrapped loss refuses, before anything is encoded; a column that
                holds no texts, or none at all.
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
        """The loss over embeddings, and the router losses where any is in use."""
        if not isinstance(self.loss, RouterLoss):
            return self.loss, None
        in_use = any(self.loss.coefficients.values())
        return self.loss.loss, self.loss if in_use else None  # type: ignore[return-value]

    def _cut(self, columns: Columns) -> list[Chunk]:
        """The batch's chunks; sets ``last_metrics`` to what they say of padding."""
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
        """``tokens_per_chunk``, which the first batch in training chooses or puts to the test."""
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
        """The settings, for the model card."""
        return {"loss": type(self.loss).__name__, "tokens_per_chunk": self.tokens_per_chunk}


def _described(loss: Any) -> str:
    name = type(loss).__name__
    return f"{name} around {type(loss.loss).__name__}" if isinstance(loss, RouterLoss) else name


def _padding_avoided(lengths: Sequence[TextLengths], chunks: Sequence[Chunk]) -> dict[str, Tensor]:
    """The share of the batch's padding that the chunks do not have; nothing where it has none."""
    real = sum(int(of.tokens.sum()) for of in lengths)
    padding = sum(of.padded for of in lengths) - real
    if not padding:
        return {}
    left = sum(len(chunk.rows) * chunk.width for chunk in chunks) - real
    return {"padding_avoided": torch.tensor(1 - left / padding)}
