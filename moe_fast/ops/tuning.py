"""Searches the best tile sizes of the Triton kernels' products on one GPU.

A search writes the GPU's tuning table into the folder that the environment variable
``MOE_FAST_TUNING`` names, or else beside the kernels. Later processes read the table there.
Products without an entry are launched by a heuristic; no search starts by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_fast.ops import backends


@dataclass(frozen=True)
class Tuned:
    """The result of a search.

    Attributes:
        path: the table that was written.
        choices: for each entry of the table: ``product``, the configurations ``before`` and
            ``after``, their times ``before_ms`` and ``after_ms`` on this GPU, and the number of
            configurations ``tried``.
    """

    path: Path
    choices: Mapping[str, Any]


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
    reason = backends.why_unavailable("expert_mlp", "triton", device.type)
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
    choices = search.search(problem, device, seconds=seconds)
    found = {key: choice.after for key, choice in choices.items()}
    return Tuned(tuning_tables.add_to_table(launch_config.gpu_name(device), found), choices)
