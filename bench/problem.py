"""Expert MLPs of many shapes on random data, for the benchmarks and the checks of ``bench.gpu``."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops

EXPERTS = 8
NAMES = ("x", "up_proj", "down_proj", "up_proj_bias", "down_proj_bias", "top_k_weights")
# Bounds of the largest error over the largest entry, against float64 on the same rounded inputs.
# They allow a few roundings, of 6e-8, 3.9e-3 and 4.9e-4 each, of the result and of the activations.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Where tokens go: to any experts; all to one; to any but the first; a third of them is skipped.
LOADS = ("any", "one", "empty", "skip")
HALF = "half"  # another load: half of the tokens to the first expert, the others to any
Run = Callable[[Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of one expert MLP, and its load."""

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
        letters = " ".join(f"{letter}={size}" for letter, size in self.letters.items())
        words = [self.dtype_name, *(["gated"] if self.gated else [])]
        words += [] if self.load == "any" else [self.load]
        return f"{letters} {' '.join(words)}"

    @property
    def letters(self) -> dict[str, int]:
        """The sizes by letters: T tokens, D and H the widths, E experts, K experts per token."""
        sizes = self.tokens, self.dim, self.hidden, self.experts, self.k
        return dict(zip("TDHEK", sizes, strict=True))

    @property
    def dtype_name(self) -> str:
        """The name of the dtype in records."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def width(self) -> int:
        """The number of columns of z, the output of the up projection."""
        return 2 * self.hidden if self.gated else self.hidden


def bert(tokens: int, dim: int, k: int, dtype: torch.dtype, **more: Any) -> Shape:
    """Return the experts of an upcycled BERT: H = 4D, and E = 8 unless given."""
    return Shape(tokens, more.pop("experts", EXPERTS), k, dim, 4 * dim, dtype, **more)


class Problem:
    """The tensors of one case: activations of unit scale, and a route without a router.

    Args:
        shape: the experts' shape.
        device: the device of the tensors.
        backend: the backend that :meth:`forward` runs on by default.
    """

    def __init__(
        self, shape: Shape, device: torch.device | str = "cpu", backend: str | None = None
    ) -> None:
        torch.manual_seed(0)
        self.shape, self.backend = shape, backend
        e, d, h = shape.experts, shape.dim, shape.hidden

        def new(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(size, device=device) * scale).to(shape.dtype)

        self.tensors: dict[str, Any] = dict(
            x=new(shape.tokens, d),
            up_proj=new(e, shape.width, d, scale=d**-0.5),
            down_proj=new(e, d, h, scale=h**-0.5),
            up_proj_bias=new(e, shape.width) if shape.bias else None,
            down_proj_bias=new(e, d) if shape.bias else None,
            top_k_weights=torch.rand(shape.tokens, shape.k, device=device) + 0.1,
        )
        self.top_k_index = _top_k_index(shape, device)
        self.plan = ops.plan(self.top_k_index, e)
        self.upstream = new(shape.tokens, d)

    def forward(
        self,
        tensors: Mapping[str, Any],
        plan: ops.RoutingPlan | None = None,
        backend: str | None = None,
        recompute: str | None = None,
    ) -> Tensor:
        """Compute expert_mlp of ``tensors``, by the problem's plan unless another one is given."""
        return ops.expert_mlp(
            **{name: tensors[name] for name in NAMES},
            plan=self.plan if plan is None else plan,
            act="silu" if self.shape.gated else "gelu",
            gated=self.shape.gated,
            recompute=recompute,
            backend=backend or self.backend,
        )

    def outputs(
        self,
        backend: str | None,
        backward: bool = True,
        dtype: torch.dtype | None = None,
        recompute: str | None = None,
    ) -> dict[str, Tensor]:
        """Return y and, with ``backward``, the gradient of every tensor, by name."""
        run = partial(self.forward, backend=backend, recompute=recompute)
        found = timed(run, self.tensors, self.upstream, backward, dtype)()
        names = ["y", *(name for name, tensor in self.tensors.items() if tensor is not None)]
        return dict(zip(names, found, strict=backward))

    def dense(self) -> tuple[dict[str, Any], Tensor]:
        """Return one expert's tensors with S = T * K input rows, and the upstream gradient."""
        tensors: dict[str, Any] = {n: self.tensors[n] for n in NAMES[1:-1]}
        tensors = {n: None if t is None else t[0].clone() for n, t in tensors.items()}
        rows = self.shape.tokens * self.shape.k
        x = self.tensors["x"]
        tensors["x"] = torch.randn(rows, self.shape.dim, device=x.device).to(x.dtype)
        return tensors, torch.randn_like(tensors["x"])


def timed(
    run: Run,
    tensors: Mapping[str, Tensor | None],
    upstream: Tensor,
    backward: bool,
    dtype: torch.dtype | None = None,
) -> Callable[[], list[Tensor]]:
    """Return a function that runs forward without gradients, or forward and backward."""
    leaves = {
        n: None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_(backward)
        for n, t in tensors.items()
    }
    wanted = [t for t in leaves.values() if t is not None]

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            y = run(leaves)
        if not backward:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, wanted, upstream.to(y.dtype))]

    return call


def _top_k_index(shape: Shape, device: torch.device | str) -> Tensor:
    """Draw [T, K] different experts per token; ids >= E are skipped."""
    scores = torch.rand(shape.tokens, shape.experts, device=device)
    if shape.load == "one":
        scores[:, -1] = 2
    if shape.load == HALF:
        scores[torch.rand(shape.tokens, device=device) < 1 / 2, 0] = 2
    if shape.load == "empty":
        scores[:, 0] = -1
    ids = scores.topk(shape.k).indices
    if shape.load == "one":
        ids[:, 1:] = shape.experts
    if shape.load == "empty":
        ids[ids == 0] = shape.experts
    if shape.load == "skip":
        ids[torch.rand(ids.shape, device=device) < 1 / 3] = shape.experts + 1
    return ids


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max|actual - expected| / max|expected|; infinity if a value is NaN or infinite."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    if difference == 0:
        return 0.0
    return difference / largest if largest and difference == difference else float("inf")


def covering(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return all combinations of values; those that together contain every pair come first.

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
