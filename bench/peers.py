"""What people would use instead, on the same tensors: [T, D] tokens routed to E stacked experts.

Every experts peer here has the signature ``run(tensors) -> y``, ``tensors`` being those of
``ops.expert_mlp``, and routes by ids that are given, so that only the experts are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import RoutingPlan

Run = Callable[[Mapping[str, Any]], Tensor]
GPU_ONLY = {
    "ScatterMoE": "scattermoe",
    "MegaBlocks": "megablocks",
    "SonicMoE": "sonicmoe",
    "Liger": "liger_kernel",
}
"""Libraries of experts whose kernels are Triton or CUDA, with the module that they install."""
ATTENTION_GPU_ONLY = {"xformers": "xformers"}
"""The same of attention, which whole models have."""


def gpu_only(*, attention: bool = False) -> dict[str, str]:
    """Why each of the GPU libraries cannot take part on a CPU."""
    return {
        name: "needs a CUDA GPU" + ("" if find_spec(module) else ", and is not installed")
        for name, module in (GPU_ONLY | (ATTENTION_GPU_ONLY if attention else {})).items()
    }


def sorted_products(plan: RoutingPlan) -> Run:
    """One product per expert and projection over rows in the plan's order, then ``index_add_``."""
    tokens, slots = plan.row_to_token, plan.row_to_slot
    counts = plan.expert_offsets.diff().tolist()
    valid = sum(counts)
    tokens, slots = tokens[:valid], slots[:valid]

    def run(t: Mapping[str, Any]) -> Tensor:
        parts = []
        for expert, rows in enumerate(t["x"][tokens].split(counts)):
            h = F.gelu(F.linear(rows, t["up_proj"][expert], _at(t["up_proj_bias"], expert)))
            parts.append(F.linear(h, t["down_proj"][expert], _at(t["down_proj_bias"], expert)))
        weights = t["top_k_weights"].reshape(-1)[slots, None]
        weighted = torch.cat(parts) * weights
        y = weighted.new_zeros(t["x"].shape).index_add(0, tokens, weighted)
        return y.to(t["x"].dtype)

    return run


def masked_loop(top_k_index: Tensor, num_experts: int) -> Run:
    """The plain loop of research code.

    For every expert and slot: a boolean mask over all tokens, the expert's MLP on what it selects,
    and an addition over all tokens.
    """

    def run(t: Mapping[str, Any]) -> Tensor:
        x, weights = t["x"], t["top_k_weights"]
        y = torch.zeros_like(x)
        for expert in range(num_experts):
            for k in range(top_k_index.shape[1]):
                mask = top_k_index[:, k] == expert
                if not mask.any():
                    continue
                h = F.linear(x[mask], t["up_proj"][expert], _at(t["up_proj_bias"], expert))
                h = F.linear(F.gelu(h), t["down_proj"][expert], _at(t["down_proj_bias"], expert))
                added = torch.zeros_like(x)
                added[mask] = (h * weights[mask, k, None]).to(x.dtype)
                y = y + added
        return y

    return run


def dense(t: Mapping[str, Any]) -> Tensor:
    """The MLP that was upcycled; ``t`` holds one expert's tensors."""
    h = F.gelu(F.linear(t["x"], t["up_proj"], t["up_proj_bias"]))
    return F.linear(h, t["down_proj"], t["down_proj_bias"])


def compiled_dense() -> Run:
    """:func:`dense` under ``torch.compile``; compiled when it is first called."""

    @torch.compile(dynamic=False)
    def mlp(x: Tensor, up: Tensor, up_bias: Any, down: Tensor, down_bias: Any) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)

    return lambda t: mlp(
        t["x"], t["up_proj"], t["up_proj_bias"], t["down_proj"], t["down_proj_bias"]
    )


def _at(bias: Tensor | None, expert: int) -> Tensor | None:
    return None if bias is None else bias[expert]
