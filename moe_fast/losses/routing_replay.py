"""Making a router's choices a second time, whatever its logits say by then.

A second forward of the same texts, with the same random state, may round differently (with a graph
other kernels may run, and sums of threads come in any order). Where two experts are all but tied
that turns a choice over, and the gradient belongs to another function than the value did.

As the recording hooks of :mod:`moe_fast.losses.routing_record` these stay on the routers and do
nothing outside the blocks below. What they do is kept by router, not by thread: gradient
checkpointing runs a layer again in a thread of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_fast.compat import has_forward_hook
from moe_fast.layers import MoERouter
from moe_fast.losses.routing_record import sentence_starts
from moe_fast.ops.route.chosen_weights import chosen_weights
from moe_fast.ops.route.modes import CHOOSING_MODES

_COMPACT = torch.int16


class RoutingChoices:
    """The experts that a model's routers chose in one forward: captured, then replayed.

    Args:
        model: its routers' hooks get on them here; wrappers are looked through.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = hook_choices(model)
        self._chosen: dict[MoERouter, Tensor] = {}  # [T, K] each

    def capturing(self) -> AbstractContextManager[None]:
        """Within the block the routers choose, each once, and their choices are kept.

        Raises:
            RuntimeError: a router ran twice: which of its choices to make again is not known.
        """
        return _active(_CAPTURING, self)

    def replaying(self) -> AbstractContextManager[None]:
        """Within the block the routers make the captured choices, as often as they run."""
        return _active(_REPLAYING, self)

    def capture(self, router: MoERouter, output: Any) -> None:
        """Keeps one router's choices, in two bytes each where the experts' number allows it."""
        if router in self._chosen:
            raise RuntimeError(
                "a router ran twice in one forward of the encoder; a gradient cache can replay "
                "one choice of each router only."
            )
        compact = router.num_experts < torch.iinfo(_COMPACT).max
        index = output.top_k_index
        self._chosen[router] = index.to(_COMPACT if compact else torch.int32)

    def replay(self, router: MoERouter, inputs: tuple[Any, ...], output: Any) -> Any:
        """The router's output with the captured choices in place of its own."""
        if router not in self._chosen:
            return output
        index = self._chosen[router].to(torch.int64)
        weights = chosen_weights(
            output.router_logits,
            index,
            mode=router.mode,
            weight_mode=router.weight_mode,
            cu_seqlens=sentence_starts(*inputs),
        )
        experts = router.num_experts
        counts = torch.bincount(index.flatten(), minlength=experts + 1)[:experts]
        return output._replace(top_k_index=index, top_k_weights=weights, tokens_per_expert=counts)


_CAPTURING: WeakKeyDictionary[MoERouter, RoutingChoices] = WeakKeyDictionary()
_REPLAYING: WeakKeyDictionary[MoERouter, RoutingChoices] = WeakKeyDictionary()


def hook_choices(model: nn.Module) -> list[MoERouter]:
    """The model's routers that choose, each with the hook on it, before any that records."""
    routers = [
        module
        for module in model.modules()
        if isinstance(module, MoERouter) and module.mode in CHOOSING_MODES
    ]
    for router in routers:
        if not has_forward_hook(router, _choose):
            router.register_forward_hook(_choose, prepend=True)
    return routers


@contextmanager
def _active(
    where: WeakKeyDictionary[MoERouter, RoutingChoices], choices: RoutingChoices
) -> Iterator[None]:
    for router in choices.routers:
        where[router] = choices
    try:
        yield
    finally:
        for router in choices.routers:
            del where[router]


@torch.compiler.disable  # a break in the graph per router, in place of a hook that is never run
def _choose(router: MoERouter, inputs: tuple[Any, ...], output: Any) -> Any:
    replaying, capturing = _REPLAYING.get(router), _CAPTURING.get(router)
    if replaying is not None:
        return replaying.replay(router, inputs, output)
    if capturing is not None:
        capturing.capture(router, output)
    return output
