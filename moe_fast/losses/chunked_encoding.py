"""Encodes a batch in chunks, twice: for the embeddings, and again for the gradient.

    values    encodes each chunk without a graph, and keeps the embeddings, a few sums for the
              router losses, and for each chunk the random state before it and the routers' choices
    backward  takes the gradient of those outputs and encodes each chunk once more, with a graph,
              with the same random state and choices; a chunk's graph is freed before the next chunk

Both together are one node of the outer graph, :func:`encode_in_chunks`. A loss scale, a division by
accumulation steps and parameters of the loss itself therefore work as usual.

Source: Gao et al. (gradient cache), arXiv 2101.06983.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states, set_device_states

from moe_fast.losses.base import EmbeddingLoss
from moe_fast.losses.head_embeddings import HeadEmbeddings, join
from moe_fast.losses.router import RouterLoss
from moe_fast.losses.routing_record import record_routing
from moe_fast.losses.routing_replay import RoutingChoices
from moe_fast.losses.text_chunks import Chunk, take_rows


def encode_in_chunks(
    loss: EmbeddingLoss,
    router_loss: RouterLoss | None,
    columns: Sequence[Mapping[str, Any]],
    chunks: Sequence[Chunk],
) -> tuple[list[Any], dict[str, Tensor]]:
    """Return each column's embeddings, and the sums by name for the router losses.

    Embeddings are what the loss's ``embed_columns`` gives: [B, d], or :class:`HeadEmbeddings`.

    If gradients are enabled and the encoder has trainable parameters, the outputs carry a graph.
    Its backward pass adds to the parameters' ``.grad``; ``torch.autograd.grad`` does not see the
    parameters.
    """
    encoding = _Encoding(loss, router_loss, columns, chunks)
    trains = any(p.requires_grad for p in loss.model.parameters())
    if torch.is_grad_enabled() and trains:
        encoding.keeps_replay = True
        handle = torch.zeros((), requires_grad=True)  # makes autograd call the backward
        outputs = _Encode.apply(handle, encoding)
    else:
        with torch.no_grad():
            outputs = encoding.values()
    embeddings, rest = encoding.unflatten(outputs)
    return embeddings, dict(zip(encoding.sum_names, rest, strict=True))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: Tensor, encoding: _Encoding) -> tuple[Tensor, ...]:
        ctx.encoding = encoding
        ctx.context = contextvars.copy_context()  # a GPU's backward runs in another thread
        return encoding.values()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.context.run(ctx.encoding.backward, grads)
        return None, None


class _Encoding:
    """One batch: its chunks, and the state that the second forward takes over from the first."""

    def __init__(
        self,
        loss: EmbeddingLoss,
        router_loss: RouterLoss | None,
        columns: Sequence[Mapping[str, Any]],
        chunks: Sequence[Chunk],
    ) -> None:
        self.loss = loss
        self.router_loss = router_loss
        self.columns = [dict(column) for column in columns]  # the encoder may change them
        self.chunks = chunks
        self.sum_names: list[str] = []
        # Of each column with several tensors, its texts' layout, without these tensors.
        self._layouts: list[HeadEmbeddings | None] = []
        self._device = chunks[0].rows.device
        self._autocast = _autocast_state(self._device)
        self.keeps_replay = False  # whether `values` keeps what `backward` needs
        self._random: list[tuple[Tensor, tuple[Any, Any]]] = []  # states of the CPU and the device
        self._choices: list[RoutingChoices] = []

    def values(self) -> tuple[Tensor, ...]:
        """Return the tensors of each column's embeddings, then the sums as in ``sum_names``."""
        parts: list[list[Any]] = [[] for _ in self.columns]
        totals: dict[str, Tensor] = {}
        for chunk in self.chunks:
            with self._remembered(chunk):
                embedding, sums = self._encode(chunk)
            parts[chunk.column].append(embedding)
            totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
        self.sum_names = list(totals)
        # Weights that autocast cast without a graph must not be reused in passes that need a graph.
        torch.clear_autocast_cache()
        embeddings = [self._in_order(column, part) for column, part in enumerate(parts)]
        self._layouts = [_layout(embedding) for embedding in embeddings]
        return *(t for embedding in embeddings for t in _tensors(embedding)), *totals.values()

    def unflatten(self, outputs: Sequence[Tensor]) -> tuple[list[Any], list[Tensor]]:
        """Return the columns' embeddings and the sums, from what :meth:`values` returned."""
        embeddings, rest = self._by_column(outputs)
        return [
            of_column[0] if layout is None else layout.with_tensors(of_column)
            for layout, of_column in zip(self._layouts, embeddings, strict=True)
        ], rest

    def _by_column(self, tensors: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Group outputs, or their gradients, by column; the sums' are the rest."""
        rest = list(tensors)
        columns = []
        for layout in self._layouts:
            count = 1 if layout is None else 3
            columns.append(rest[:count])
            del rest[:count]
        return columns, rest

    def backward(self, grads: Sequence[Tensor]) -> None:
        """Add to the parameters' ``.grad``, given the gradients of :meth:`values`' outputs."""
        of_columns, of_sums = self._by_column(grads)
        with torch.enable_grad(), random_state_kept(self._device):
            for number, chunk in enumerate(self.chunks):
                last = number == len(self.chunks) - 1
                with nullcontext() if last else without_sync(self.loss.model):
                    cpu, devices = self._random[number]
                    torch.set_rng_state(cpu)
                    set_device_states(*devices)
                    with self._choices[number].replaying():
                        with self._autocast_as_before():
                            embedding, sums = self._encode(chunk)
                        outputs = [*_tensors(embedding), *(sums[n] for n in self.sum_names)]
                        _backward(outputs, [*self._rows_of(of_columns, chunk), *of_sums])

    def _rows_of(self, of_columns: list[list[Tensor]], chunk: Chunk) -> list[Tensor]:
        """Take a chunk's part of the columns' gradients."""
        layout, grads = self._layouts[chunk.column], of_columns[chunk.column]
        return [grads[0][chunk.rows]] if layout is None else layout.rows_of(grads, chunk.rows)

    def _in_order(self, column: int, parts: list[Any]) -> Any:
        """Return the column's embeddings in the batch's order, from those of its chunks."""
        rows = [chunk.rows for chunk in self.chunks if chunk.column == column]
        if isinstance(parts[0], HeadEmbeddings):
            return join(parts, rows)
        return torch.cat(parts)[torch.cat(rows).argsort()]

    def _encode(self, chunk: Chunk) -> tuple[Any, dict[str, Tensor]]:
        """Return the chunk's embeddings and its part of the sums, by name."""
        features = take_rows(self.columns[chunk.column], chunk)
        if self.router_loss is None:
            return self.loss.embed_columns([features])[0], {}
        with record_routing(self.loss.model) as recorder:
            embedding = self.loss.embed_columns([features])[0]
        return embedding, self.router_loss.statistics(recorder.result(), [features])

    @contextmanager
    def _remembered(self, chunk: Chunk) -> Iterator[None]:
        """Keep the random state before the block and its routing choices, if ``keeps_replay``."""
        if not self.keeps_replay:
            yield
            return
        self._random.append((torch.get_rng_state(), get_device_states(chunk.rows)))
        choices = RoutingChoices(self.loss.model)
        self._choices.append(choices)
        with choices.capturing():
            yield

    @contextmanager
    def _autocast_as_before(self) -> Iterator[None]:
        with ExitStack() as stack:
            for state in self._autocast:
                stack.enter_context(torch.autocast(**state))
            yield


def _tensors(embedding: Any) -> tuple[Tensor, ...]:
    return embedding.tensors if isinstance(embedding, HeadEmbeddings) else (embedding,)


def _layout(embedding: Any) -> HeadEmbeddings | None:
    if not isinstance(embedding, HeadEmbeddings):
        return None
    nothing = embedding.dense.new_empty(0)
    return embedding.with_tensors((nothing, nothing, nothing))


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Restore the random state of the CPU and of ``device`` at the end of the block."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def _autocast_state(device: torch.device) -> list[dict[str, Any]]:
    """Return ``torch.autocast`` arguments that restore its state on the CPU and ``device``."""
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in dict.fromkeys(("cpu", device.type))
    ]


def without_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block, DistributedDataParallel does not average gradients.

    The backward pass of the last chunk, outside such a block, averages all of them.
    """
    # torch.compile's wrapper has the model that it compiles as its only child.
    for module in (model, *model.children()):
        if isinstance(module, DistributedDataParallel):
            return module.no_sync()
    return nullcontext()


def forwards_together(model: nn.Module) -> bool:
    """Whether all processes must run each forward pass together, as fully sharded models do."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    sharded = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(module, sharded) for module in model.modules())


def _backward(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Run backward through the outputs that carry a graph (those of frozen parts do not)."""
    wanted = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    if wanted:
        torch.autograd.backward([out for out, _ in wanted], [grad for _, grad in wanted])
