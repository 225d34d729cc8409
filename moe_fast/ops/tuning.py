"""Searches the best tile sizes of the Triton kernels' products on one GPU.

A search writes the GPU's tuning table into the folder that the environment variable
``MOE_FAST_TUNING`` names, or else beside the kernels. Later processes read the table there.
Products without an entry are launched by a heuristic; no search starts by itself. At the end the
whole mixture is timed with each implementation, and the fastest is kept: a table never makes it
slower than what was in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import backends


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        path: the table that was written.
        choices: for each entry of the table: ``product``, the configurations ``before`` and
            ``after``, their times ``before_ms`` and ``after_ms`` on this GPU, the number of
            configurations ``tried``, and the ``fastest`` of each implementation.
        layer_ms: milliseconds of forward and backward of the whole mixture, by name: with the
            configurations "before", with those "found" for each product alone, and with one
            implementation wherever it can compute.
        kept: the name of the fastest of these, which the table has.
    """

    path: Path
    choices: Mapping[str, Any]
    layer_ms: Mapping[str, float]
    kept: str


def tune(
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    num_experts_per_tok: int = 1,
    *,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    gated: bool = False,
    target: str = "mlp",
    seconds: float = 120.0,
    device: torch.device | str | None = None,
) -> Tuned:
    """Search tile sizes for a mixture's forward and backward, and write the GPU's table.

    Args:
        hidden_size, intermediate_size, num_experts, num_experts_per_tok: D, H, E, K.
        tokens: T, the number of tokens in a typical batch without padding. Tables are looked up by
            rows per expert, T * K / E, rounded to a power of two.
        dtype: the dtype that the kernels will get (under autocast, autocast's): float32, bfloat16
            or float16.
        gated: whether experts are gated.
        target: the part of the MLP that is replicated into experts, as in :class:`moe_fast.MoEMLP`.
        seconds: the approximate time of the search.
        device: a GPU; ``None``: the current one.

    Raises:
        RuntimeError: the kernels cannot run; the message says why.
        ValueError: the sizes or the dtype are not allowed.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reason = backends.why_unavailable("expert_mlp", "triton", device.type, device.index)
    if reason is not None:
        raise RuntimeError(f"there is nothing to tune on {device.type}: {reason}.")
    from moe_fast.triton_ops import launch_config, tuning_tables
    from moe_fast.triton_ops import tune as search

    problem = search.Problem(
        tokens=tokens,
        experts=num_experts,
        k=num_experts_per_tok,
        dim=hidden_size,
        hidden=intermediate_size,
        dtype=dtype,
        gated=gated,
        target=target,
    )
    gpu, times = launch_config.gpu_name(device), {}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        choices = search.layers(search.search(problem, device, seconds=seconds))
        tables = {name: {k: c.after for k, c in found.items()} for name, found in choices.items()}
        run = _layer(problem, device)
        for name, table in tables.items():
            with tuning_tables.in_use(gpu, table):
                times[name] = search.milliseconds(lambda _: run(), next(iter(table.values())))
    kept = min(times, key=lambda name: times[name])
    if times[kept] > search.GAIN * times["before"]:
        kept = "before"
    path = tuning_tables.add_to_table(gpu, tables[kept])
    return Tuned(path, choices[kept], times, kept)


def _layer(problem: Any, device: torch.device) -> Callable[[], object]:
    """Return forward and backward of the whole mixture on random data."""
    from moe_fast import ops

    p, one = problem, problem.target != "mlp"

    def new(*shape: int, scale: float = 1.0) -> Tensor:
        made = (torch.randn(shape, device=device) * scale).to(p.dtype)
        return made.requires_grad_()

    ids = torch.rand(p.tokens, p.experts, device=device).topk(p.k).indices
    plan = ops.plan(ids, p.experts, backend="triton")
    weights = torch.rand(p.tokens, p.k, device=device).requires_grad_()
    inner, outer = (p.hidden, p.dim) if p.target == "output" else (p.dim, p.width)
    first, bias = new(p.experts, outer, inner, scale=inner**-0.5), new(p.experts, outer)
    leaves = [new(p.tokens, inner), first, bias, weights]
    if not one:
        leaves += [new(p.experts, p.dim, p.hidden, scale=p.hidden**-0.5), new(p.experts, p.dim)]
    upstream = torch.randn(p.tokens, outer if one else p.dim, device=device).to(p.dtype)

    def run() -> object:
        x, up, up_bias, w, *down = leaves
        if one:
            y = ops.expert_linear(x, up, up_bias, w, plan, backend="triton")
        else:
            act = "silu" if p.gated else "gelu"
            y = ops.expert_mlp(
                x, up, down[0], up_bias, down[1], w, plan, act=act, gated=p.gated, backend="triton"
            )
        return torch.autograd.grad(y, leaves, upstream)

    return run
