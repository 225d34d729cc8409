"""Registered ops with a short way past the dispatcher.

``torch.compile``, ``torch.export``, dispatch modes, function transforms and tensors of a kind of
their own must see a registered op. In plain eager mode nobody does, and the dispatcher's way to a
kernel that is called from Python takes 8 microseconds, 35 with autograd: more than a small
problem's work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fast.compat import nobody_looks

_PLAIN = (Tensor, torch.nn.Parameter)


def register_op(
    name: str,
    kernel: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Register a ``torch.library.custom_op``; a function that calls it, or its parts in eager mode.

    Args:
        name: with its namespace.
        kernel: computes the results; its annotations make the schema.
        fake: shapes of the results.
        setup_context, backward: as for ``register_autograd``; ``None`` for an op without gradients.
    """
    op = torch.library.custom_op(name, kernel, mutates_args=())
    op.register_fake(fake)
    differentiate: Callable = op  # which then says that there is no gradient
    if setup_context is not None and backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
        differentiate = _function(name, kernel, setup_context, backward).apply

    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not nobody_looks():
            return op(*args)
        tensors = [a for a in args if isinstance(a, Tensor)]
        if not all(type(t) in _PLAIN for t in tensors):  # a DTensor, a fake tensor
            return op(*args)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return differentiate(*args)
        return kernel(*args)

    return run


def _function(name: str, kernel: Callable, setup_context: Callable, backward: Callable) -> Any:
    """A ``torch.autograd.Function``. One with ``setup_context`` of its own takes 15 us longer."""

    def forward(ctx: Any, *args: Any) -> Any:
        results = kernel(*args)
        setup_context(ctx, args, results)
        return results

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{name}_eager", (torch.autograd.Function,), members)
