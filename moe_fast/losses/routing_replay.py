"""Replays the routing choices of a first forward pass in a second one, whatever its logits are.

A second forward pass over the same texts, with the same random state, may round differently: with
a graph other kernels may run, and threads add up in any order. If two experts are almost tied, the
choice may then change, and the gradient would belong to another function than the value.

Like the hooks of :mod:`moe_fast.losses.routing_record`, these stay on the routers and do nothing
outside the blocks below. The active choices are stored by router, not by thread, because gradient
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
    """The experts that a model's routers chose in one forward pass, for a second one.

    Args:
        model: the model whose routers get the hooks here; routers inside wrappers are found too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.routers = hook_choices(model)
        self._chosen: dict[MoERouter, Tensor] = {}  # [T, K] each: tokens, choices

    def capturing(self) -> AbstractContextManager[None]:
        """Within the block, keep the choices of every router; each may run once.

        Raises:
            RuntimeError: a router ran twice, so that it is unclear which of its choices to replay.
        """
        return _active(_CAPTURING, self)

    def replaying(self) -> AbstractContextManager[None]:
        """Within the block, routers return the captured choices, however often they run."""
        return _active(_REPLAYING, self)

    def capture(self, router: MoERouter, output: Any) -> None:
        """Store the expert ids that one router chose, for replay in the second forward pass.

        They are stored as int16 if the number of experts fits, else as int32. Raises
        ``RuntimeError`` if the router has run before.
        """
        if router in self._chosen:
            raise RuntimeError(
                "a router ran twice in one forward of the encoder; a gradient cache can replay "
                "one choice of each router only."
            )
        compact = router.num_experts < torch.iinfo(_COMPACT).max
        index = output.top_k_index
        self._chosen[router] = index.to(_COMPACT if compact else torch.int32)

    def replay(self, router: MoERouter, inputs: tuple[Any, ...], output: Any) -> Any:
        """Return the router's output with the captured choices in place of its own.

        The weights of the chosen experts are computed from the new logits. The output of a router
        without captured choices is returned as it is.
        """
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
    """Return the model's routers that choose experts, with the replay hook on each.

    The hook runs before all others, so that a recording hook sees the replayed choices.
    """
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


@torch.compiler.disable  # a graph break per router; traced, the hook would never run
def _choose(router: MoERouter, inputs: tuple[Any, ...], output: Any) -> Any:
    replaying, capturing = _REPLAYING.get(router), _CAPTURING.get(router)
    if replaying is not None:
        return replaying.replay(router, inputs, output)
    if capturing is not None:
        capturing.capture(router, output)
    return output
