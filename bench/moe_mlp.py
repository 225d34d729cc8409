"""The whole layer with its router, against other experts behind the same router, and a dense MLP.

- ``dense``: the MLP that was upcycled, over T*K rows: the same products, without routing.
- ``eager loop``: what transformers does without a grouped product. It makes a one-hot mask, and for
  each expert that has tokens it gathers them, computes the MLP and adds by ``index_add_``; routing
  and weights are the same.

Two directions are measured: forward without gradients, and forward with backward to the input and
every parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fast import MoEMLP, ops
from moe_fast.layers.routing_info import RoutingInfo

from .cases import OURS, Candidates, Case, near
from .peers import masked_loop, sorted_products
from .record import Work

EXPERTS, HIDDEN, TOKENS = 8, 384, 1024


def eager_loop(moe: MoEMLP, x: Tensor) -> Tensor:
    """Compute ``moe(x)`` [T, D] by a loop over the experts that have tokens."""
    _, weights, index, _ = moe.router(x, RoutingInfo())
    (up, up_bias), (down, down_bias) = moe.projection("up_proj"), moe.projection("down_proj")
    assert up_bias is not None and down_bias is not None
    hits = F.one_hot(index, moe.num_experts).permute(2, 1, 0)  # [E, K, T]
    out = torch.zeros_like(x)
    for expert in hits.sum(dim=(1, 2)).nonzero().flatten().tolist():
        k, token = torch.where(hits[expert])
        h = F.gelu(F.linear(x[token], up[expert], up_bias[expert]))
        y = F.linear(h, down[expert], down_bias[expert])
        out.index_add_(0, token, y * weights[token, k, None].to(y.dtype))
    return out


def with_eager_experts(model: Any) -> Any:
    """Copy ``model``; :func:`eager_loop` computes the copy's experts, padding included."""

    def forward(moe: MoEMLP, hidden_states: Tensor, **_: Any) -> Tensor:
        return eager_loop(moe, hidden_states.flatten(0, -2)).view(hidden_states.shape)

    eager = copy.deepcopy(model)
    for module in eager.modules():
        if isinstance(module, MoEMLP):
            module.forward = partial(forward, module)  # type: ignore[method-assign]
    return eager


def timed(
    run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, grad: Tensor | None
) -> Callable[[], list[Tensor]]:
    """Return a function that runs ``run``; with ``grad`` also backward to x and the parameters."""
    leaves = [x.detach().clone().requires_grad_(), *module.parameters()]

    def call() -> list[Tensor]:
        with torch.set_grad_enabled(grad is not None):
            y = run(leaves[0])
        if grad is None:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    return call


def cases(size: str) -> Iterator[Case]:
    """Yield the whole layer, router and plan included, in both directions."""
    dim, tokens = (32, [24]) if size == "tiny" else (HIDDEN, [TOKENS])
    if size == "full":
        tokens = [256, 2048, 8192]
    for t, k, backward in product(tokens, (1, 2), (False, True)):
        yield Case(
            f"MoE layer, {'forward + backward' if backward else 'forward'}",
            {"T": t, "D": dim, "H": 4 * dim, "E": EXPERTS, "K": k},
            "float32",
            partial(candidates, t, dim, k, backward),
            work(t, dim, k, backward),
        )


def work(tokens: int, dim: int, k: int, backward: bool, experts: int = EXPERTS) -> Work:
    """Count the work of the experts and of the router (none for one expert), biases included."""
    router = experts * dim if experts > 1 else 0
    flop = 2 * tokens * k * 2 * dim * 4 * dim + 2 * tokens * router
    weights = experts * (2 * 4 * dim**2 + 5 * dim) + router
    io = 2 * tokens * dim
    if backward:  # also reads x, grad y and the weights; writes grad x and the weights' gradients
        return Work(3 * flop, 4 * (2.5 * io + 3 * weights))
    return Work(flop, 4 * (io + weights))


def candidates(tokens: int, dim: int, k: int, backward: bool) -> Candidates:
    """Make MoEMLP, its parameters in other experts, and dense over as many rows."""
    # "probability" gives weights other than 1 even for K = 1, so that the check covers them.
    moe = MoEMLP(dim, 4 * dim, EXPERTS, k, weight_mode="probability")
    plain = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
    compiled = torch.compile(plain, dynamic=False)
    x = torch.randn(tokens, dim)
    rows = x.repeat_interleave(k, dim=0)
    grad, grad_rows = (torch.randn_like(t) if backward else None for t in (x, rows))
    others: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: moe,
        "eager loop": partial(eager_loop, moe),
        **_with_our_router(moe),
    }
    runs = {name: timed(f, moe, x, grad) for name, f in others.items()}
    runs["dense"] = timed(plain, plain, rows, grad_rows)
    runs["dense, compiled"] = timed(compiled, plain, rows, grad_rows)
    double = copy.deepcopy(moe).double()
    with ops.use_backend("torch"):
        exact = timed(double, double, x.double(), None if grad is None else grad.double())()
    apart = ("dense", "dense, compiled")
    works = dict.fromkeys(apart, work(tokens * k, dim, 1, backward, experts=1))
    return Candidates(runs, near(exact, 1e-5, apart), works=works)


def _with_our_router(moe: MoEMLP) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return peers' experts behind the layer's own router."""

    def tensors(x: Tensor) -> tuple[dict[str, Any], Tensor]:
        _, weights, index, _ = moe.router(x, RoutingInfo())
        return dict(moe.named_parameters(), x=x, top_k_weights=weights), index

    def masked(x: Tensor) -> Tensor:
        t, index = tensors(x)
        return masked_loop(index, moe.num_experts)(t)

    def products(x: Tensor) -> Tensor:
        t, index = tensors(x)
        return sorted_products(ops.plan(index, moe.num_experts, backend="torch"))(t)

    return {"masked loop": masked, "per-expert products": products}
