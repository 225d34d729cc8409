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
_UNKNOWN = object()
_PLAIN = frozenset({type(None), bool, int, float, str})
T = TypeVar("T")


def once_per_signature(find_out: Callable[..., T]) -> Callable[..., T]:
    """``find_out``, whose result is remembered for calls of the same signature.

    The signature is the shape, dtype, device and ``requires_grad`` of each tensor (and of the
    ``indices`` of each plan), the type and value of each other argument, and the state around the
    call: autocast, whether gradients are recorded, the default backend. ``find_out`` must depend
    on nothing else: not on the values of tensors. What it raises is not remembered.
    """
    known: dict[tuple, Any] = {}

    @functools.wraps(find_out)
    def run(first: Tensor, *args: Any) -> T:
        if torch.compiler.is_compiling():  # a graph must not depend on which calls came before
            return find_out(first, *args)
        try:
            signature = _signature(first, args)
            found = known.get(signature, _UNKNOWN)
        except (AttributeError, TypeError, RuntimeError):
            # Such as what find_out will refuse, symbolic sizes, a device without autocast.
            return find_out(first, *args)
        if found is _UNKNOWN:
            found = find_out(first, *args)
            if len(known) >= _MOST:
                known.clear()
            known[signature] = found
        return found

    return run


def _signature(first: Tensor, args: tuple[Any, ...]) -> tuple:
    # The order of the questions, and is_cpu before device, are for speed: each op asks this first.
    device_type = "cpu" if first.is_cpu else first.device.type
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    grad = torch.is_grad_enabled()
    signature = [backends.default, grad, autocast]
    for value in (first, *args):
        kind = value.__class__
        if kind in _PLAIN:
            signature += (kind, value)  # 1, 1.0 and True are equal
        elif isinstance(value, Tensor):
            device = value.is_cpu or value.device
            signature += (value.shape, value.dtype, device, grad and value.requires_grad)
        else:
            for index in value.indices:
                signature += (index.shape, index.dtype, index.is_cpu or index.device)
    return tuple(signature)
