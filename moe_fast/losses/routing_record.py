"""Records the decisions of every router while a loss encodes a batch.

A forward hook on each :class:`moe_fast.layers.MoERouter` writes to a record, if one is open. The
hooks stay on the routers, because ``torch.compile`` ignores hooks that are added after its first
trace. Outside a record they do nothing: in evaluation, or in the second forward of gradient
checkpointing, which runs in the backward pass. The hook holds no state, so models can be copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.compat import has_forward_hook
from moe_fast.layers import MoERouter, RoutingInfo
from moe_fast.ops.route.reference import sentence_of_token


@dataclass(frozen=True)
class RoutingRecord:
    """The routing of one forward pass of a loss: T tokens of S sentences, E experts, K choices.

    Attributes:
        logits: [layers, T, E], with their graph.
        top_k_index: [layers, T, K] int64; padding tokens have ids >= E.
        token_mask: [T] bool, True for real tokens.
        num_sentences: S; ``None`` if a batch was encoded without sentence boundaries.
        sentence_ids: [T] int64 in [0, S), in the order of encoding; ``None`` as above.
    """

    logits: Tensor
    top_k_index: Tensor
    token_mask: Tensor
    num_sentences: int | None
    sentence_ids: Tensor | None


class Recorder:
    """Collects the outputs of some routers; see :func:`record_routing`."""

    def __init__(self, routers: list[MoERouter]) -> None:
        # For each router and batch of texts: its output, and the starts of the texts.
        self._calls: dict[MoERouter, list[tuple[Any, Tensor | None]]] = {r: [] for r in routers}
        self._with_grad = torch.is_grad_enabled()

    def add(self, router: MoERouter, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep one output of a router; routers of other models (such as a guide) are ignored.

        Raises ``ValueError`` if the router ran without gradients in a record opened with gradients.
        """
        if router not in self._calls:
            return
        if self._with_grad and not torch.is_grad_enabled():
            raise ValueError(
                "the router losses need the encoder's graph, but it ran without gradients inside "
                "the loss. Use moe_fast's CachedLoss, around the RouterLoss, for a gradient cache, "
                "and gradient checkpointing with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        self._calls[router].append((output, sentence_starts(*inputs)))

    def result(self) -> RoutingRecord:
        """Join all calls to one batch, in the order of encoding.

        Raises:
            RuntimeError: nothing was recorded, or not every router ran equally often.
        """
        layers = list(self._calls.values())
        if not layers[0] or len({len(calls) for calls in layers}) > 1:
            raise RuntimeError(
                "the model's routers were not seen running (calls per router: "
                f"{[len(calls) for calls in layers]}). Make the RouterLoss before the model's "
                "first run under torch.compile; nn.DataParallel is not supported "
                "(DistributedDataParallel is)."
            )
        index = torch.stack([torch.cat([out.top_k_index for out, _ in calls]) for calls in layers])
        logits = torch.stack(
            [torch.cat([out.router_logits for out, _ in calls]) for calls in layers]
        )
        num_sentences, sentence_ids = _join_sentences(layers[0])
        token_mask = index[0, :, 0] < logits.shape[-1]
        return RoutingRecord(logits, index, token_mask, num_sentences, sentence_ids)


def sentence_starts(hidden_states: Tensor, info: RoutingInfo) -> Tensor | None:
    """Return the first token of each of the B sentences, then the end: [B + 1] int64.

    ``None`` if the router's input has no sentence boundaries.
    """
    if info.cu_seqlens is not None:
        return info.cu_seqlens.to(torch.int64)
    if hidden_states.dim() != 3:
        return None
    batch, length = hidden_states.shape[:2]
    return torch.arange(batch + 1, device=hidden_states.device) * length


def _join_sentences(
    calls: list[tuple[Any, Tensor | None]],
) -> tuple[int | None, Tensor | None]:
    """Number the sentences of all calls consecutively; (None, None) if a batch had none.

    Returns their number and the sentence of every token [T].
    """
    total, parts = 0, []
    for output, starts in calls:
        if starts is None:
            return None, None
        parts.append(sentence_of_token(starts, len(output.top_k_index)) + total)
        total += len(starts) - 1
    return total, torch.cat(parts)


_RECORDER: ContextVar[Recorder | None] = ContextVar("moe_fast_routing_recorder", default=None)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Recorder]:
    """Record every router of ``model`` within the block; routers inside wrappers are found too.

    While a record is open inside another, only the inner one records.
    """
    recorder = Recorder(hook_routers(model))
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)


def hook_routers(model: nn.Module) -> list[MoERouter]:
    """Return the model's routers in the order of its layers, with the recording hook on each."""
    routers = [module for module in model.modules() if isinstance(module, MoERouter)]
    for router in routers:
        if not has_forward_hook(router, _record_call):
            router.register_forward_hook(_record_call)
    return routers


@torch.compiler.disable  # a graph break per router; traced, the hook would never run
def _record_call(router: MoERouter, inputs: tuple[Any, ...], output: Any) -> None:
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.add(router, inputs, output)
