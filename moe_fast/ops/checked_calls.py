"""What an op finds out about its arguments once for all calls that look alike.

A model calls an op with the same shapes, dtypes and devices in every layer, and comparing them
with what was seen before takes a fraction of the time that checking them, and choosing who
computes, takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_fast.ops import backends

_MOST = 4096  # calls remembered by one function; packed batches have many lengths
T = TypeVar("T")


def once_per_signature(find_out: Callable[..., T]) -> Callable[..., T]:
    """``find_out``, whose result is remembered for calls of the same signature.

    The signature is the shape, dtype, device and ``requires_grad`` of each tensor (and of the
    ``indices`` of each plan), the type and value of each other argument, and the state around the
    call: autocast, whether gradients are recorded, the default backend. ``find_out`` must depend
    on nothing else: not on the values of tensors. What it raises is not remembered.
    """
    known: dict[tuple, T] = {}

    @functools.wraps(find_out)
    def run(first: Tensor, *args: Any) -> T:
        if torch.compiler.is_compiling():  # a graph must not depend on which calls came before
            return find_out(first, *args)
        try:
            signature = _signature(first, args)
            if signature in known:
                return known[signature]
        except (AttributeError, TypeError, RuntimeError):
            # Such as what find_out will refuse, symbolic sizes, a device without autocast.
            return find_out(first, *args)
        result = find_out(first, *args)
        if len(known) >= _MOST:
            known.clear()
        known[signature] = result
        return result

    return run


def _signature(first: Tensor, args: tuple[Any, ...]) -> tuple:
    device_type = first.device.type
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    signature = [backends.default, torch.is_grad_enabled(), autocast]
    for value in (first, *args):
        if isinstance(value, Tensor):
            signature += (value.shape, value.dtype, value.device, value.requires_grad)
            continue
        indices = getattr(value, "indices", None)
        if indices is None:
            signature += (value.__class__, value)
        else:
            for index in indices:
                signature += (index.shape, index.dtype, index.device)
    return tuple(signature)
