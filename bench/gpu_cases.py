"""What ``bench/gpu.py`` checks and times: expert MLPs of many shapes, on random data."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops

NAMES = ("x", "up_proj", "down_proj", "up_proj_bias", "down_proj_bias", "top_k_weights")
# Largest error over largest entry, against float64 on the same rounded inputs: a few roundings of
# the result and of the activations between the products, 6e-8, 3.9e-3 and 4.9e-4 each.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Where tokens go: to any experts; to one and the same; to any but the first; a third is skipped.
LOADS = ("any", "one", "empty", "skip")


@dataclass(frozen=True)
class Case:
    """One expert MLP and its load."""

    tokens: int
    experts: int
    k: int
    dim: int
    hidden: int
    dtype: torch.dtype
    gated: bool = False
    bias: bool = True
    load: str = "any"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = [
            f"T={self.tokens} E={self.experts} K={self.k} D={self.dim} H={self.hidden} {dtype}",
            *(["gated"] if self.gated else []),
            *([] if self.load == "any" else [self.load]),
        ]
        return " ".join(words)

    @property
    def width(self) -> int:
        """Columns of z."""
        return 2 * self.hidden if self.gated else self.hidden


class Problem:
    """Tensors of one case: activations of unit scale, and a route without a router."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        e, d, h = case.experts, case.dim, case.hidden

        def new(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(case.dtype)

        self.tensors: dict[str, Tensor | None] = dict(
            x=new(case.tokens, d),
            up_proj=new(e, case.width, d, scale=d**-0.5),
            down_proj=new(e, d, h, scale=h**-0.5),
            up_proj_bias=new(e, case.width) if case.bias else None,
            down_proj_bias=new(e, d) if case.bias else None,
            top_k_weights=torch.rand(case.tokens, case.k, device=device) + 0.1,
        )
        self.top_k_index = _top_k_index(case, device)
        self.plan = ops.plan(self.top_k_index, e)
        self.upstream = new(case.tokens, d)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        """The tensors once more, wanting gradients; in ``dtype`` if that is given."""
        return {
            n: None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
            for n, t in self.tensors.items()
        }

    def forward(
        self,
        tensors: Mapping[str, Any],
        plan: ops.RoutingPlan | None = None,
        backend: str = "triton",
        recompute: str | None = None,
    ) -> Tensor:
        """expert_mlp of ``tensors``, by the problem's plan if no other is given."""
        x, up, down, up_bias, down_bias, weights = (tensors[name] for name in NAMES)
        return ops.expert_mlp(
            x,
            up,
            down,
            up_bias,
            down_bias,
            weights,
            self.plan if plan is None else plan,
            act="silu" if self.case.gated else "gelu",
            gated=self.case.gated,
            recompute=recompute,
            backend=backend,
        )

    def results(
        self,
        backend: str,
        dtype: torch.dtype | None = None,
        recompute: str | None = None,
    ) -> dict[str, Tensor]:
        """y and the gradient of every tensor."""
        leaves = self.leaves(dtype)
        y = self.forward(leaves, backend=backend, recompute=recompute)
        wanted = {n: t for n, t in leaves.items() if t is not None}
        grads = torch.autograd.grad(y, list(wanted.values()), self.upstream.to(y.dtype))
        return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def _top_k_index(case: Case, device: torch.device) -> Tensor:
    """[T, K]: K different experts per token, as a route would give; ids >= E are skipped."""
    scores = torch.rand(case.tokens, case.experts, device=device)
    if case.load == "one":
        scores[:, -1] = 2
    if case.load == "empty":
        scores[:, 0] = -1
    ids = scores.topk(case.k).indices
    if case.load == "one":
        ids[:, 1:] = case.experts
    if case.load == "empty":
        ids[ids == 0] = case.experts
    if case.load == "skip":
        ids[torch.rand(ids.shape, device=device) < 1 / 3] = case.experts + 1
    return ids


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|; NaN and inf are matched by nothing."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    if difference == 0:
        return 0.0
    return difference / largest if largest and difference == difference else float("inf")


def covering(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations of values, those first that together hold every pair of them.

    The order is the same in every run.
    """
    combinations = list(itertools.product(*axes.values()))
    random.Random(0).shuffle(combinations)
    first: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    seen: set[tuple] = set()
    for combination in combinations:
        pairs = set(itertools.combinations(enumerate(combination), 2))
        (rest if pairs <= seen else first).append(dict(zip(axes, combination, strict=True)))
        seen |= pairs
    return first + rest
