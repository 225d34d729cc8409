"""route on a GPU: Triton computes logits, choice, weights and counts in one pass over x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import triton_backend
from moe_fast.ops.checks import check_starts, compute_dtype
from moe_fast.ops.route.modes import SENTENCE_MODES
from moe_fast.ops.route.reference import check_logits, implement


def _settings(mode: str, weight_mode: str, k: int, num_experts: int) -> Any:
    from moe_fast.triton_ops.top_k import RouteSettings

    dense = mode == "dense"
    return RouteSettings(
        k=num_experts if dense else k,
        weight_mode=weight_mode,
        sentences=mode in SENTENCE_MODES,
        dense=dense,
    )


@triton_backend.on_device
def _route(
    x: Tensor, router_weight: Tensor, k: int, mode: str, weight_mode: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from moe_fast.triton_ops import route

    token_mask, starts = rest
    check_starts(starts, x.shape[0])
    settings = _settings(mode, weight_mode, k, router_weight.shape[0])
    dtype = compute_dtype(torch.promote_types(x.dtype, router_weight.dtype))
    results = route.route(x, router_weight, settings, token_mask, starts, dtype)
    check_logits(results[1])
    return results


@triton_backend.on_device
def _route_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from moe_fast.triton_ops import route_grad

    *tensors, k, mode, weight_mode, token_mask, starts = inputs
    settings = _settings(mode, weight_mode, k, tensors[3].shape[0])
    return route_grad.route_backward(*tensors, settings, token_mask, starts)


triton_backend.offer("route", implement("route_triton", _route, _route_backward))
