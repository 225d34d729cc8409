"""openai/privacy-filter's experts at their real size, random weights, by transformers and by us.

128 experts of 640 x 640, 4 per token, clamped SwiGLU, biases; weights in bfloat16 and products in
float32, as the model asks. ``eager`` is transformers' default for this model; its other forms
multiply in bfloat16. ``bare products`` are the products alone, by torch, of rows that are sorted
already, with weights that are float32 already: with torch's library nothing can be faster. Of ours
the whole forward pass is timed, plan included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moe_fast  # noqa: F401 - registers experts_implementation="moe_fast"

from .cases import OURS, Candidates, Case, near
from .onnx_experts import onnx_runtime, why_missing
from .record import Work

BARE, ONNX = "bare products", "ONNX Runtime"
TOLERANCE = 4e-3
"""Of y, which is rounded to bfloat16."""


def cases(size: str) -> Iterator[Case]:
    """The real model's shape, but for a test."""
    sizes = dict(dim=640, hidden=640, experts=128, k=4)
    tokens = {"quick": [512], "full": [32, 512, 2048, 8192]}.get(size, [512, 8192])
    if size == "tiny":
        sizes, tokens = dict(dim=32, hidden=16, experts=8, k=2), [24]
    yield from (case_of(t, **sizes) for t in tokens)


def case_of(tokens: int, dim: int, hidden: int, experts: int, k: int) -> Case:
    """One number of tokens, forward."""
    flop = 2 * tokens * k * 3 * dim * hidden
    weights = min(experts, tokens * k) * 3 * dim * hidden
    return Case(
        "privacy-filter experts, forward",
        {"T": tokens, "D": dim, "H": hidden, "E": experts, "K": k},
        "float32",
        partial(candidates, tokens, dim, hidden, experts, k),
        Work(flop, 2 * (2 * tokens * dim + weights)),
    )


def candidates(tokens: int, dim: int, hidden: int, num_experts: int, k: int) -> Candidates:
    """transformers' module under its default and ours, and the products alone."""
    experts = new_experts(dim, hidden, num_experts)
    x = torch.randn(tokens, dim).bfloat16()
    scores = torch.randn(tokens, num_experts)
    best, index = scores.topk(k)
    weights = best.softmax(-1) / k
    runs: dict[str, Callable[[], Any]] = {
        name: forward(experts, implementation, x, index, weights)
        for name, implementation in ((OURS, "moe_fast"), ("eager", "eager"))
    }
    runs[BARE] = bare_products(experts, index.flatten().bincount(minlength=num_experts).tolist())
    absent = dict.fromkeys(("batched_mm", "grouped_mm"), "multiplies in bfloat16")
    if (reason := why_missing()) is None:
        runs[ONNX] = onnx_runtime(experts, scores, k, x)
    else:
        absent[ONNX] = reason
    check = near([exact(experts, x, index, weights)], TOLERANCE, [BARE])
    return Candidates(runs, check, absent)


def new_experts(dim: int, hidden: int, num_experts: int) -> Any:
    """transformers' module with random bfloat16 weights."""
    from transformers.models.openai_privacy_filter import modeling_openai_privacy_filter as theirs

    config = theirs.OpenAIPrivacyFilterConfig(
        hidden_size=dim, intermediate_size=hidden, num_local_experts=num_experts
    )
    with torch.device("meta"):
        module = theirs.OpenAIPrivacyFilterExperts(config).to(torch.bfloat16)
    module = module.to_empty(device="cpu").requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter.normal_(std=1.0 if name.endswith("bias") else parameter.shape[1] ** -0.5)
    return module


def forward(
    experts: Any, implementation: str, x: Tensor, index: Tensor, weights: Tensor
) -> Callable[[], list[Tensor]]:
    """A call of the module under one implementation; parameters are shared."""
    module, config = copy.copy(experts), copy.copy(experts.config)
    config._experts_implementation = implementation
    module.config = config

    def call() -> list[Tensor]:
        with torch.no_grad():
            return [module(x, index, weights)]

    return call


def bare_products(experts: Any, counts: list[int]) -> Callable[[], list[Tensor]]:
    """Both products of every expert that has rows, into memory that is there already."""
    up, down = experts.gate_up_proj.float(), experts.down_proj.float()
    x, h = torch.randn(max(counts), up.shape[1]), torch.randn(max(counts), down.shape[1])
    z, y = x.new_empty(max(counts), up.shape[2]), x.new_empty(max(counts), down.shape[2])
    used = [(e, n) for e, n in enumerate(counts) if n]

    def call() -> list[Tensor]:
        for e, n in used:
            torch.mm(x[:n], up[e], out=z[:n])
            torch.mm(h[:n], down[e], out=y[:n])
        return [y]

    return call


def exact(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The formulas in float64."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for e in index.unique().tolist():
        token, slot = torch.where(index == e)
        z = x[token].double() @ experts.gate_up_proj[e].double()
        gate, up = (z + experts.gate_up_proj_bias[e].double()).chunk(2, dim=-1)
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        f = h @ experts.down_proj[e].double() + experts.down_proj_bias[e].double()
        y.index_add_(0, token, weights[token, slot, None].double() * f)
    return y
