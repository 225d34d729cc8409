"""Random problems for each native op: its arguments, and both forms of what it computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops
from moe_fast.ops.route.modes import resolve_weight_mode

from .helpers import DTYPES

SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 96, 127, 128, 129, 200, 260]
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """An op under test.

    Attributes:
        draw: random arguments by name; those called ``grad_*`` are upstream gradients.
        run: the op and its backward: outputs and gradients, by the native library or by the
            reference, which takes float64, too.
    """

    draw: Callable[[random.Random], Arguments]
    run: Callable[[Arguments, bool], list[Tensor]]


def _namespace(native: bool) -> Any:
    return torch.ops.moe_fast_cpp if native else torch.ops.moe_fast


def _without(arguments: Arguments, *names: str) -> list[Any]:
    return [value for name, value in arguments.items() if name not in names]


def _draw_plan(rng: random.Random) -> tuple[ops.RoutingPlan, int, Tensor]:
    """A plan, E and routing weights [T, K]: experts empty or large, slots skipped."""
    experts = rng.choice([1, 2, 3, 5, 8, 16])
    tokens, k = rng.choice([0, *SIZES, 700, 2200]), rng.randint(1, min(experts, 3))
    ids = torch.randint(0, rng.randint(1, experts), (tokens, k))
    ids = torch.where(torch.rand(tokens, k) < rng.choice([0.0, 0.3, 1.0]), experts, ids)
    return ops.plan(ids, experts), experts, torch.rand(tokens, k) + 0.1


def _tensors_of(plan: ops.RoutingPlan) -> Arguments:
    names = ("expert_offsets", "row_to_token", "row_to_slot", "slot_to_row")
    return {name: getattr(plan, name) for name in names}


def eighths(*shape: int) -> Tensor:
    """Multiples of 1/8 in [-1, 1]."""
    return torch.randint(-8, 9, shape) / 8


# --- plan, gather_rows, combine_rows -------------------------------------------------------------


def draw_plan(rng: random.Random) -> Arguments:
    experts = rng.choice([1, 2, 8, 64, 1024])
    tokens, k = rng.choice([0, *SIZES, 5000]), rng.randint(1, 4)
    ids = torch.randint(0, experts + rng.randint(0, 2), (tokens, k))
    return dict(
        top_k_index=ids.to(rng.choice([torch.int32, torch.int64])).clamp(max=experts),
        num_experts=experts,
    )


def run_plan(arguments: Arguments, native: bool) -> list[Tensor]:
    return list(_namespace(native).plan(*arguments.values()))


def draw_gather_rows(rng: random.Random) -> Arguments:
    plan, _, weights = _draw_plan(rng)
    x = torch.randn(len(weights), rng.choice(SIZES)).to(rng.choice(DTYPES))
    return dict(x=x, **_tensors_of(plan))


def run_gather_rows(arguments: Arguments, native: bool) -> list[Tensor]:
    skipped = ("row_to_slot", "slot_to_row") if native else ("row_to_slot",)
    return [_namespace(native).gather_rows(*_without(arguments, *skipped))]


def draw_combine_rows(rng: random.Random) -> Arguments:
    plan, _, weights = _draw_plan(rng)
    dim, dtype = rng.choice(SIZES), rng.choice(DTYPES)
    return dict(
        grad_y=torch.randn(len(weights), dim).to(dtype),
        rows=torch.randn(weights.numel(), dim).to(dtype),
        top_k_weights=weights,
        expert_offsets=plan.expert_offsets,
        slot_to_row=plan.slot_to_row,
    )


def run_combine_rows(arguments: Arguments, native: bool) -> list[Tensor]:
    skipped = ("grad_y", "expert_offsets") if native else ("grad_y",)
    y = _namespace(native).combine_rows(*_without(arguments, *skipped))
    return [y, *_namespace(native).combine_rows_backward(*arguments.values())]


# --- experts -------------------------------------------------------------------------------------


def draw_expert_mlp(rng: random.Random) -> Arguments:
    """Where a rounding of z could decide its slope, z is a sum of products of eighths: exact."""
    plan, experts, weights = _draw_plan(rng)
    tokens, dim, dtype = len(weights), rng.choice(SIZES), rng.choice(DTYPES)
    hidden, gated = rng.choice([*SIZES, 600]), rng.random() < 0.4
    up = 2 * hidden if gated else hidden
    act = rng.choice(["gelu", "gelu_tanh", "relu", "silu", "clamped_swiglu"])
    exact = act in ("relu", "clamped_swiglu")

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    def before_act(*shape: int, scale: float = 1.0) -> Tensor:
        return eighths(*shape).to(dtype) if exact else normal(*shape, scale=scale)

    return dict(
        grad_y=normal(tokens, dim),
        x=before_act(tokens, dim),
        up_proj=before_act(experts, up, dim, scale=dim**-0.5),
        down_proj=normal(experts, dim, hidden, scale=hidden**-0.5),
        up_proj_bias=before_act(experts, up) if rng.random() < 0.6 else None,
        down_proj_bias=normal(experts, dim) if rng.random() < 0.6 else None,
        top_k_weights=weights,
        **_tensors_of(plan),
        act=act,
        gated=gated,
        save=rng.random() < 0.5,
    )


def run_expert_mlp(arguments: Arguments, native: bool) -> list[Tensor]:
    grad_y, *tensors, act, gated, save = arguments.values()
    y, saved = _namespace(native).expert_mlp(*tensors, act, gated, save)
    backward = _namespace(native).expert_mlp_backward
    return [y, *backward(grad_y, *tensors, saved, act, gated)]


def draw_expert_linear(rng: random.Random) -> Arguments:
    plan, experts, weights = _draw_plan(rng)
    tokens, dim, dtype = len(weights), rng.choice(SIZES), rng.choice(DTYPES)
    outputs = rng.choice(SIZES)
    weight = torch.randn(experts, outputs, dim) * dim**-0.5
    return dict(
        grad_y=torch.randn(tokens, outputs).to(dtype),
        x=torch.randn(tokens, dim).to(dtype),
        weight=weight.to(dtype),
        bias=torch.randn(experts, outputs).to(dtype) if rng.random() < 0.6 else None,
        top_k_weights=weights,
        **_tensors_of(plan),
    )


def run_expert_linear(arguments: Arguments, native: bool) -> list[Tensor]:
    grad_y, *tensors = arguments.values()
    y = _namespace(native).expert_linear(*tensors)
    return [y, *_namespace(native).expert_linear_backward(grad_y, *tensors)]


# --- route, attention ----------------------------------------------------------------------------


def draw_starts(tokens: int, rng: random.Random) -> Tensor:
    """[B + 1] int64: where sentences start, empty ones among them."""
    cuts = sorted(rng.randint(0, tokens) for _ in range(rng.randint(0, 5)))
    return torch.tensor([0, *cuts, tokens])


def draw_route(rng: random.Random) -> Arguments:
    """What differs between float32 and float64 must decide no choice.

    Tokens choose by sums of products of eighths, which are exact. Sentences choose by means, where
    equals become unequal by rounding: their values are normal, and only the best are asked for.
    """
    experts, dim = rng.choice([1, 2, 3, 4, 6, 8, 9, 70]), rng.choice(SIZES)
    tokens, dtype = rng.choice([0, *SIZES, 700]), rng.choice(DTYPES)
    mode = rng.choice(["token_topk", "sentence_topk", "sentence_switch", "dense"])
    sentences = mode.startswith("sentence")
    most = {"sentence_switch": 1, "sentence_topk": min(experts, 3)}.get(mode, experts)
    k = rng.randint(1, most)
    wanted = rng.choice(["renormalize", "probability", "straight_through", "one"])
    starts = draw_starts(tokens, rng) if sentences or rng.random() < 0.5 else None

    def values(*shape: int) -> Tensor:
        return (torch.randn(shape) if sentences else eighths(*shape)).to(dtype)

    return dict(
        grad_weights=torch.randn(tokens, experts if mode == "dense" else k),
        grad_logits=torch.randn(tokens, experts),
        x=values(tokens, dim),
        router_weight=values(experts, dim),
        num_experts_per_tok=k,
        mode=mode,
        weight_mode=resolve_weight_mode(mode, "auto" if mode == "dense" else wanted, k),
        token_mask=torch.rand(tokens) < 0.7 if rng.random() < 0.5 else None,
        starts=starts,
    )


def run_route(arguments: Arguments, native: bool) -> list[Tensor]:
    grad_weights, grad_logits, x, router_weight, *rest = arguments.values()
    weights, logits, index, counts = _namespace(native).route(x, router_weight, *rest)
    backward = _namespace(native).route_backward
    grads = backward(grad_weights, grad_logits, x, router_weight, logits, *rest)
    return [weights, logits, index, counts, *grads]


def draw_varlen_attention(rng: random.Random) -> Arguments:
    tokens, dtype = rng.choice([0, *SIZES]), rng.choice(DTYPES)
    heads, dim = rng.randint(1, 3), rng.choice(SIZES)
    return dict(
        **{n: torch.randn(tokens, heads, dim).to(dtype) for n in ("query", "key", "value")},
        cu_seqlens=draw_starts(tokens, rng),
        scale=rng.choice([0.0, 0.3, dim**-0.5]),
        window=rng.choice([None, 0, 1, 20, 1000]),
    )


def run_varlen_attention(arguments: Arguments, native: bool) -> list[Tensor]:
    if native:
        return [torch.ops.moe_fast_cpp.varlen_attention(*arguments.values())]
    *tensors, scale, window = arguments.values()
    return [ops.varlen_attention(*tensors, scale=scale, window=window, backend="torch")]


SUBJECTS = {
    "plan": Subject(draw_plan, run_plan),
    "gather_rows": Subject(draw_gather_rows, run_gather_rows),
    "combine_rows": Subject(draw_combine_rows, run_combine_rows),
    "expert_mlp": Subject(draw_expert_mlp, run_expert_mlp),
    "expert_linear": Subject(draw_expert_linear, run_expert_linear),
    "route": Subject(draw_route, run_route),
    "varlen_attention": Subject(draw_varlen_attention, run_varlen_attention),
}
