"""Remembers what an op found out about its arguments, for later calls with the same signature.

The signature consists of shapes, dtypes, devices and settings. A model calls an op with the same
signature in every layer. Looking it up is several times faster than checking the arguments and
choosing a backend again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from moe_fast.ops import backends

_MOST = 4096  # signatures that one function remembers; packed batches have many lengths
_UNKNOWN = object()
_PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype})
T = TypeVar("T")


def once_per_signature(find_out: Callable[..., T]) -> Callable[..., T]:
    """Decorate ``find_out`` so that its result is remembered for calls of the same signature.

    The signature is the shape, dtype, device and ``requires_grad`` of each tensor, the layout of
    each plan (or the shapes, dtypes and devices of its ``indices``), the type and value of each
    other argument, and the state around the call: autocast, whether gradients are enabled, the
    default backend. ``find_out`` must depend on nothing else; in particular not on the values of
    tensors. Errors are not remembered.
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
            # Arguments that find_out will refuse, symbolic sizes, or a device without autocast.
            return find_out(first, *args)
        if found is _UNKNOWN:
            found = find_out(first, *args)
            if len(known) >= _MOST:
                known.clear()
            if backends.default == signature[0]:  # another thread may have changed it meanwhile
                known[signature] = found
        return found

    return run


def _signature(first: Tensor, args: tuple[Any, ...]) -> tuple:
    # Each op calls this first: the order of the tests, and is_cpu before device, are for speed.
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
            signature += (kind, value.layout)
            if value.layout is None:
                for index in value.indices:
                    signature += (index.shape, index.dtype, index.is_cpu or index.device)
    return tuple(signature)
