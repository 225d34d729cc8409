"""Checks that run once for all calls that look alike.

A model calls an op with the same shapes, dtypes and devices in every layer, and comparing them
with what was seen before takes a fraction of the time that checking them takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fast.ops.plan import RoutingPlan

_MOST = 4096  # calls remembered by one check; packed batches have many lengths


def once_per_signature(check: Callable[..., None]) -> Callable[..., None]:
    """``check``, which is left out for a call whose signature passed it before.

    The signature is the shape, dtype and device of each tensor (and of those of each plan), the
    type and value of each other argument, and whether autocast is on. ``check`` must depend on
    nothing else: not on the values of tensors.
    """
    passed: set[tuple] = set()

    @functools.wraps(check)
    def run(first: Tensor, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return check(first, *args)
        try:
            signature = _signature(first, args)
            if signature in passed:
                return
        except (AttributeError, TypeError, RuntimeError):
            # Such as what check will refuse, sizes traced symbolically, a device without autocast.
            return check(first, *args)
        check(first, *args)
        if len(passed) >= _MOST:
            passed.clear()
        passed.add(signature)

    return run


def _signature(first: Tensor, args: tuple[Any, ...]) -> tuple:
    autocast = torch.is_autocast_enabled(first.device.type)
    signature = [first.shape, first.dtype, first.device, autocast]
    for value in args:
        if isinstance(value, Tensor):
            signature += (value.shape, value.dtype, value.device)
        elif isinstance(value, RoutingPlan):
            for index in value.indices:
                signature += (index.shape, index.dtype, index.device)
        else:
            signature += (value.__class__, value)
    return tuple(signature)
