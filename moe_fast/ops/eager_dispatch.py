"""Registers ops in such a way that eager calls bypass PyTorch's dispatcher.

``torch.compile``, ``torch.export``, dispatch modes, function transforms and tensor subclasses need
a registered op. A plain eager call does not: the dispatcher takes 8 microseconds to reach a kernel
that is written in Python, and 35 with autograd, which is longer than a small problem takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fast.compat import observers_of_ops

_PLAIN = (Tensor, torch.nn.Parameter)
_in_dispatch_mode, _interpreter, _forward_ad_level = observers_of_ops()


def nobody_looks() -> bool:
    """Whether no dispatch mode, ``torch.func`` transform or forward-mode autograd is active."""
    return not _in_dispatch_mode() and _interpreter() is None and _forward_ad_level() < 0


@dataclass(frozen=True)
class Operation:
    """What all implementations of an op share: schema, shapes of results, form of the gradient.

    The arguments of an op are its tensors, then its settings. Its backward op takes the gradient of
    the first result, the tensors, the results ``saved`` and the first ``settings`` settings. It
    returns gradients of the first ``differentiable`` tensors; the gradient of a tensor that is
    ``None`` is ignored. Only the first result has a gradient. Ops of another form are registered by
    :func:`register_op`.

    Attributes:
        signature: an implementation whose annotations give the op's schema. The other
            implementations take the same arguments by position.
        fake: returns empty results of the right shapes, see ``torch.library.register_fake``.
        fake_backward: the same for the gradients; ``None`` for an op without gradients.
        differentiable: how many tensors have a gradient.
        saved: the indices of the results that are kept for the backward op.
        settings: how many settings the backward op takes; ``None``: all.
    """

    signature: Callable
    fake: Callable
    fake_backward: Callable | None = None
    differentiable: int = 0
    saved: tuple[int, ...] = ()
    settings: int | None = None

    def implement(self, name: str, forward: Callable, backward: Callable | None = None) -> Callable:
        """Register ``forward`` as the op ``moe_fast::{name}``, with its gradient.

        ``backward`` becomes the op ``moe_fast::{name}_backward``, which autograd calls.

        Returns:
            The function to call; it takes the arguments of this operation's signature by position.
        """
        name, schema = f"moe_fast::{name}", schema_of(self.signature)
        if backward is None:
            return register_op(name, schema, forward, self.fake)
        assert self.fake_backward is not None
        run_backward = register_op(
            f"{name}_backward", self._backward_schema(schema), backward, self.fake_backward
        )
        gradients = functools.partial(_gradients, run_backward)
        return register_op(name, schema, forward, self.fake, self._keep_for_backward, gradients)

    def _backward_schema(self, schema: str) -> str:
        arguments = schema[1 : schema.index(")")].split(", ")
        tensors = [argument for argument in arguments if argument.startswith("Tensor")]
        settings = arguments[len(tensors) :][: self.settings]
        results = [f"Tensor saved_{place}" for place in self.saved]
        takes = ", ".join(["Tensor grad", *tensors, *results, *settings])
        return f"({takes}) -> ({', '.join(['Tensor'] * self.differentiable)})"

    def _keep_for_backward(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = (output,) if isinstance(output, Tensor) else output
        tensors = [value for value in inputs if value is None or isinstance(value, Tensor)]
        ctx.save_for_backward(*tensors, *(results[i] for i in self.saved))
        ctx.settings = inputs[len(tensors) :][: self.settings]
        ctx.num_inputs = len(inputs)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # else autograd allocates zeros as large as the results


def _gradients(backward: Callable, ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:  # only results without a gradient were used
        return (None,) * ctx.num_inputs
    tensors = ctx.saved_tensors  # read once: gradient checkpointing unpacks at each read
    grads = backward(grad, *tensors, *ctx.settings)
    found = [None if t is None else g for t, g in zip(tensors, grads, strict=False)]
    return *found, *[None] * (ctx.num_inputs - len(found))


def schema_of(signature: Callable) -> str:
    """Return the schema that torch infers from the annotations of a function."""
    return torch.library.infer_schema(signature, mutates_args=())


def register_op(
    name: str,
    schema: str,
    kernel: Callable,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Register a ``torch.library.custom_op``, and return a function that bypasses it if eager.

    Args:
        name: the op's name with its namespace.
        schema: from :func:`schema_of`.
        kernel: computes the results.
        fake: returns empty results of the right shapes.
        setup_context, backward: as for ``register_autograd``; ``None`` for an op without gradients.
    """
    op = torch.library.custom_op(name, kernel, mutates_args=(), schema=schema)
    op.register_fake(fake)
    differentiate: Callable = op  # without a backward, this raises the error
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
    """Make a ``torch.autograd.Function``; ``forward`` sets up the context.

    A separate ``setup_context`` method would take 15 microseconds longer.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        results = kernel(*args)
        setup_context(ctx, args, results)
        return results

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{name}_eager", (torch.autograd.Function,), members)
