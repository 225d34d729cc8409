"""Random problems, and random nonsense, for the native ops: right or refused, never a crash.

Problems have any shape, dtype, activation and thread count, and are compared with the reference in
float64. Nonsense is a problem with a few of its arguments damaged: values of index tensors, shapes,
dtypes, layouts, names. The op may refuse it with RuntimeError, or find that it still makes sense.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops

from .helpers import num_threads, relative_error

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 96, 127, 128, 129, 200, 260]


def draw(rng: random.Random) -> dict[str, Any]:
    """The arguments of ``moe_fast_cpp::expert_mlp``, by name."""
    experts = rng.choice([1, 2, 3, 5, 8, 16])
    tokens, k = rng.choice([0, *SIZES, 700]), rng.randint(1, min(experts, 3))
    dim, hidden, gated = rng.choice(SIZES), rng.choice([*SIZES, 600]), rng.random() < 0.4
    dtype = rng.choice(list(TOLERANCES))
    up = 2 * hidden if gated else hidden

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    # Few experts of many, so that some are empty and one is large; some slots skipped.
    used = rng.randint(1, experts)
    ids = torch.randint(0, used, (tokens, k))
    ids = torch.where(torch.rand(tokens, k) < rng.choice([0.0, 0.3, 1.0]), experts, ids)
    plan = ops.plan(ids, experts)
    return dict(
        x=normal(tokens, dim),
        up_proj=normal(experts, up, dim, scale=dim**-0.5),
        down_proj=normal(experts, dim, hidden, scale=hidden**-0.5),
        up_proj_bias=normal(experts, up) if rng.random() < 0.6 else None,
        down_proj_bias=normal(experts, dim) if rng.random() < 0.6 else None,
        top_k_weights=torch.rand(tokens, k) + 0.1,
        expert_offsets=plan.expert_offsets,
        row_to_token=plan.row_to_token,
        row_to_slot=plan.row_to_slot,
        slot_to_row=plan.slot_to_row,
        act=rng.choice(["gelu", "gelu_tanh", "relu", "silu"]),
        gated=gated,
        save=rng.random() < 0.5,
    )


def forward_backward(arguments: dict[str, Any], upstream: Tensor, native: bool) -> list[Tensor]:
    """y and the six gradients, by the native ops or by the reference."""
    *tensors, act, gated, save = arguments.values()
    namespace = torch.ops.moe_fast_cpp if native else torch.ops.moe_fast
    y, saved = namespace.expert_mlp(*tensors, act, gated, save)
    return [y, *namespace.expert_mlp_backward(upstream, *tensors, saved, act, gated)]


def check_right(arguments: dict[str, Any]) -> None:
    """Raise AssertionError unless the native ops agree with the reference in float64."""
    dtype = arguments["x"].dtype
    upstream = torch.randn(arguments["x"].shape).to(dtype)
    exact = {
        n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in arguments.items()
    }
    actual = forward_backward(arguments, upstream, native=True)
    expected = forward_backward(exact, upstream.double(), native=False)
    for position, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        # Single sums that cancel have no relative accuracy: values below 1 count as 1.
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        error = relative_error(ours, theirs) * min(largest, 1.0) if largest else ours.abs().sum()
        assert error <= TOLERANCES[dtype], f"output {position}: error {error:.1e}"


def damage(arguments: dict[str, Any], rng: random.Random) -> None:
    """Change one argument, in a way that may or may not matter."""
    name = rng.choice(list(arguments))
    value = arguments[name]
    if value is None:
        return
    if not isinstance(value, Tensor):
        arguments["act"] = rng.choice(["", "gelu", "no such name"])
        return
    if value.dtype == torch.int64 and value.numel() and rng.random() < 0.8:
        wrong = [-(2**63), -2, -1, 0, 1, value.numel(), 2**31, 2**62, rng.randint(-3, 800)]
        value = value.clone()
        value[rng.randrange(value.numel())] = rng.choice(wrong)
        arguments[name] = value
        return
    ways = {
        "shorter": lambda: value[:-1],
        "longer": lambda: torch.cat([value, value[:1]]),
        "flat": lambda: value.flatten(),
        "strided": lambda: torch.stack([value] * 2, -1)[..., 0],
        "dtype": lambda: value.to(rng.choice([torch.float64, torch.int32, torch.bfloat16])),
        "none": lambda: None,
        "empty": lambda: value[..., :0],
    }
    arguments[name] = ways[rng.choice(list(ways))]()


def check_survives(arguments: dict[str, Any], rng: random.Random) -> bool:
    """Damage the arguments and call the ops; whether they were refused."""
    upstream = torch.randn(arguments["x"].shape).to(arguments["x"].dtype)
    for _ in range(rng.randint(1, 3)):
        damage(arguments, rng)
    try:
        forward_backward(arguments, upstream, native=True)
    except (RuntimeError, TypeError, AttributeError):  # the last two: None for a tensor
        return True
    return False


def fuzz(seconds: float, seed: int) -> dict[str, int]:
    """Run for so long; counts of what was tried. Raises at the first failure, which it names."""
    counts = {"problems": 0, "nonsense": 0, "refused": 0}
    end = time.monotonic() + seconds
    case = 0
    while time.monotonic() < end:
        rng = random.Random(f"{seed}-{case}")
        torch.manual_seed(rng.getrandbits(32))
        try:
            arguments = draw(rng)
            with num_threads(rng.choice([1, 2, 3])):
                if rng.random() < 0.5:
                    counts["problems"] += 1
                    check_right(arguments)
                else:
                    counts["nonsense"] += 1
                    counts["refused"] += check_survives(arguments, rng)
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}: {error}") from error
        case += 1
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    """Fuzz, and print the seed first: it repeats the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args(argv)
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    print(fuzz(arguments.seconds, seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
