"""Alternatives to our experts on the same tensors: [T, D] tokens routed to E stacked experts.

Every alternative has the signature ``run(tensors) -> y``, with the tensors of ``ops.expert_mlp``.
It routes by given ids, so only the experts are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_fast.ops import RoutingPlan

from .problem import NAMES, Problem, Run

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
    """Return why each of the GPU libraries cannot take part on a CPU."""
    return {
        name: "needs a CUDA GPU" + ("" if find_spec(module) else ", and is not installed")
        for name, module in (GPU_ONLY | (ATTENTION_GPU_ONLY if attention else {})).items()
    }


def sorted_products(plan: RoutingPlan) -> Run:
    """Return one product per expert and projection over sorted rows, followed by ``index_add_``."""
    tokens, slots = plan.row_to_token, plan.row_to_slot
    counts = plan.expert_offsets.diff().tolist()
    valid = sum(counts)
    tokens, slots = tokens[:valid], slots[:valid]

    def run(t: Mapping[str, Any]) -> Tensor:
        parts = [expert_mlp(t, e, rows) for e, rows in enumerate(t["x"][tokens].split(counts))]
        weights = t["top_k_weights"].reshape(-1)[slots, None]
        weighted = torch.cat(parts) * weights
        y = weighted.new_zeros(t["x"].shape).index_add(0, tokens, weighted)
        return y.to(t["x"].dtype)

    return run


def masked_loop(top_k_index: Tensor, num_experts: int) -> Run:
    """Return the simple loop of much research code.

    For every expert and slot it makes a boolean mask over all tokens, computes the expert's MLP on
    the tokens in the mask, and adds over all tokens.
    """

    def run(t: Mapping[str, Any]) -> Tensor:
        x, weights = t["x"], t["top_k_weights"]
        y = torch.zeros_like(x)
        for expert in range(num_experts):
            for k in range(top_k_index.shape[1]):
                mask = top_k_index[:, k] == expert
                if not mask.any():
                    continue
                h = expert_mlp(t, expert, x[mask])
                added = torch.zeros_like(x)
                added[mask] = (h * weights[mask, k, None]).to(x.dtype)
                y = y + added
        return y

    return run


def transformers_experts(problem: Problem, implementation: str) -> Run:
    """Return transformers' ungated experts (NemotronHExperts), which have no biases."""
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    shape = problem.shape
    config = NemotronHConfig(
        n_routed_experts=shape.experts,
        hidden_size=shape.dim,
        moe_intermediate_size=shape.hidden,
        mlp_hidden_act="gelu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = NemotronHExperts(config)

    def run(t: Mapping[str, Any]) -> Tensor:
        for name in ("up_proj", "down_proj"):
            experts._parameters[name] = t[name]  # functional_call would cost time
        return experts(t["x"], problem.top_k_index, t["top_k_weights"])

    return run


def dense(t: Mapping[str, Any]) -> Tensor:
    """Compute the MLP that was upcycled; ``t`` holds one expert's tensors."""
    return mlp(t["x"], t["up_proj"], t["up_proj_bias"], t["down_proj"], t["down_proj_bias"])


def mlp(x: Tensor, up: Tensor, up_bias: Any, down: Tensor, down_bias: Any) -> Tensor:
    """Compute the up projection, GELU and the down projection."""
    return F.linear(F.gelu(F.linear(x, up, up_bias)), down, down_bias)


def compiled_dense(backend: str = "inductor") -> Run:
    """Return :func:`dense` under ``torch.compile``, which compiles at the first call."""
    compiled = torch.compile(mlp, dynamic=False, backend=backend)
    return lambda t: compiled(
        t["x"], t["up_proj"], t["up_proj_bias"], t["down_proj"], t["down_proj_bias"]
    )


def expert_mlp(t: Mapping[str, Any], expert: int, rows: Tensor) -> Tensor:
    """Compute one of the stacked experts in ``t`` on ``rows``."""
    weights = {n: None if t[n] is None else t[n][expert] for n in NAMES[1:-1]}
    return dense({"x": rows, **weights})
