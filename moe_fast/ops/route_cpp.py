"""route on a CPU: logits, choice, weights and counts in two passes, kernels/csrc/cpu/route.cpp."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_fast.ops import backends, native
from moe_fast.ops.route import (
    NonFiniteLogitsError,
    backward,
    fake,
    fake_backward,
    save_for_backward,
)
from moe_fast.ops.shortcut import register_op


def _route(
    x: Tensor,
    router_weight: Tensor,
    num_experts_per_tok: int,
    mode: str,
    weight_mode: str,
    token_mask: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    try:
        return native.call(
            torch.ops.moe_fast_cpp.route,
            *(x, router_weight, num_experts_per_tok, mode, weight_mode, token_mask, starts),
        )
    except ValueError as error:
        if str(error).startswith(NonFiniteLogitsError.START):
            raise NonFiniteLogitsError(str(error)) from None
        raise


def _route_backward(
    grad_weights: Tensor,
    grad_logits: Tensor,
    x: Tensor,
    router_weight: Tensor,
    logits: Tensor,
    num_experts_per_tok: int,
    mode: str,
    weight_mode: str,
    token_mask: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return native.call(
        torch.ops.moe_fast_cpp.route_backward,
        *(grad_weights, grad_logits, x, router_weight, logits),
        *(num_experts_per_tok, mode, weight_mode, token_mask, starts),
    )


_run = register_op(
    "moe_fast::route_cpp",
    _route,
    fake,
    save_for_backward,
    functools.partial(
        backward, register_op("moe_fast::route_cpp_backward", _route_backward, fake_backward)
    ),
)
backends.register("route", "cpp", _run, native.why_not_on_cpu, leaves_to_torch=(torch.float64,))
