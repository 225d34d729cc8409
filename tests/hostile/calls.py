"""Calls of the native ops with tensors that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moe_fast import ops
from tests.hostile.cases import Case, nothing

T, D, H, E, K = 5, 8, 6, 3, 2
# Other inputs that are right: fewer choices, ids that are documented to be skipped, a batch of one.
_RIGHT = {
    ("plan", "top_k_index", "too narrow"),
    ("plan", "top_k_index", "out of range"),
    ("route", "x", "one dimension more"),
}


def cases() -> Iterator[Case]:
    """Each argument of each op, spoilt in every way."""
    for name, (call, arguments) in _calls().items():
        yield Case("control", name, "", nothing, _use(call, arguments), control=True)
        for argument, value in arguments.items():
            for how, bad in _spoilt(value):
                changed = {**arguments, argument: bad}
                yield Case(
                    "native call",
                    f"{name}: {argument} {how}",
                    "",
                    nothing,
                    _use(call, changed),
                    (*arguments, "plan"),
                    control=(name, argument, how) in _RIGHT,
                )


def _use(call: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[Path], Any]:
    return lambda path: call(**arguments)


def _calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, router = random(T, D), random(E, D)
    routing = ops.route(x, router, K)
    plan = ops.plan(routing.top_k_index, E)
    return {
        "route": (ops.route, {"x": x, "router_weight": router, "num_experts_per_tok": K}),
        "plan": (ops.plan, {"top_k_index": routing.top_k_index, "num_experts": E}),
        "expert_mlp": (
            lambda **given: ops.expert_mlp(plan=plan, **given),
            {
                "x": x,
                "up_proj": random(E, H, D),
                "down_proj": random(E, D, H),
                "up_proj_bias": random(E, H),
                "down_proj_bias": random(E, D),
                "top_k_weights": routing.top_k_weights,
            },
        ),
        "info_nce": (
            lambda **given: ops.info_nce(scale=20.0, **given),
            {"a": random(T, D), "b": random(T, D)},
        ),
    }


def _spoilt(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, int):
        yield from (("0", 0), ("-1", -1), ("2**40", 2**40), ("text", "x"), ("1.5", 1.5))
        yield "True", True
        return
    yield "a list", value.tolist()
    yield "text", "x"
    yield "too narrow", value[..., :-1]
    yield "one dimension more", value[None]
    yield "a scalar", value.flatten()[0]
    yield "truth values", value.bool()
    yield "complex", value.to(torch.complex64)
    if value.is_floating_point():
        yield "whole numbers", value.int()
        yield "float64", value.double()
    else:
        yield "floating numbers", value.float()
        yield "out of range", value + 10**6
        yield "negative", value - 10**6
