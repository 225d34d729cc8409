"""The whole layer, router included, against other experts behind its router, and a dense MLP.

- ``dense``: the MLP that was upcycled, over T*K rows: the same products, no routing.
- ``eager loop``: what transformers does where no grouped product is at hand: a one-hot mask, and
  for each expert that was hit a gather, its MLP and an ``index_add_``; same routing, same weights.

Both directions: forward alone without gradients, and forward with backward to the input and to
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


class DenseMLP(nn.Module):
    """The dense MLP: up, GELU, down."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, intermediate_size)
        self.down = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [rows, D] to [rows, D]."""
        return self.down(F.gelu(self.up(x)))


def eager_loop(moe: MoEMLP, x: Tensor) -> Tensor:
    """``moe(x)`` [T, D] by a loop over the experts that were hit."""
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


def eager_forward(moe: MoEMLP) -> Callable[..., Tensor]:
    """A ``forward`` of ``moe`` by :func:`eager_loop`."""

    def forward(hidden_states: Tensor, **_: Any) -> Tensor:
        return eager_loop(moe, hidden_states.flatten(0, -2)).view(hidden_states.shape)

    return forward


def forward(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """A callable that runs forward alone."""

    def call() -> Tensor:
        with torch.no_grad():
            return run(x)

    return call


def forward_backward(
    run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, grad: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """A callable that runs forward and backward, and returns the output and all gradients."""
    leaves = {"x": x.detach().clone().requires_grad_(), **dict(module.named_parameters())}

    def call() -> dict[str, Tensor]:
        for leaf in leaves.values():
            leaf.grad = None
        y = run(leaves["x"])
        y.backward(grad)
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"y": y.detach(), **grads}

    return call


def cases(size: str) -> Iterator[Case]:
    """The whole layer, router and plan included, in both directions."""
    dim, tokens = (32, [24]) if size == "tiny" else (HIDDEN, [TOKENS])
    if size == "full":
        tokens = [256, 2048, 8192]
    for t, k, backward in product(tokens, (1, 2), (False, True)):
        yield case_of(t, dim, k, backward)


def case_of(tokens: int, dim: int, k: int, backward: bool) -> Case:
    """One shape in one direction, in float32."""
    return Case(
        f"MoE layer, {'forward + backward' if backward else 'forward'}",
        {"T": tokens, "D": dim, "H": 4 * dim, "E": EXPERTS, "K": k},
        "float32",
        lambda: candidates(tokens, dim, k, backward),
        work(tokens, dim, k, backward),
    )


def work(tokens: int, dim: int, k: int, backward: bool, experts: int = EXPERTS) -> Work:
    """The experts' products and the router's, none where there is but one expert; biases too."""
    router = experts * dim if experts > 1 else 0
    flop = 2 * tokens * k * 2 * dim * 4 * dim + 2 * tokens * router
    weights = experts * (2 * 4 * dim**2 + 5 * dim) + router
    io = 2 * tokens * dim
    if backward:  # read x, y's gradient; write x's. Read the weights again; write theirs.
        return Work(3 * flop, 4 * (2.5 * io + 3 * weights))
    return Work(flop, 4 * (io + weights))


def candidates(tokens: int, dim: int, k: int, backward: bool) -> Candidates:
    """MoEMLP, the same parameters through other experts, and dense over as many rows."""
    # "probability" gives weights that differ from 1 at K = 1 too, so that the check sees them.
    moe = MoEMLP(dim, 4 * dim, EXPERTS, k, weight_mode="probability")
    plain = DenseMLP(dim, 4 * dim)
    compiled = torch.compile(plain, dynamic=False)
    x = torch.randn(tokens, dim)
    rows = x.repeat_interleave(k, dim=0)
    grad, grad_rows = torch.randn_like(x), torch.randn_like(rows)

    def run(f: Callable[[Tensor], Tensor], module: nn.Module, t: Tensor, g: Tensor) -> Any:
        call = forward_backward(f, module, t, g) if backward else forward(f, t)
        return lambda: _as_list(call())

    others: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: moe,
        "eager loop": partial(eager_loop, moe),
        **_with_our_router(moe),
    }
    runs = {name: run(f, moe, x, grad) for name, f in others.items()}
    exact = _exact(moe, x, grad, backward)
    runs["dense"] = run(plain, plain, rows, grad_rows)
    runs["dense, compiled"] = run(compiled, plain, rows, grad_rows)
    apart = ("dense", "dense, compiled")
    works = dict.fromkeys(apart, work(tokens * k, dim, 1, backward, experts=1))
    return Candidates(runs, near(exact, 1e-5, apart), works=works)


def _with_our_router(moe: MoEMLP) -> dict[str, Callable[[Tensor], Tensor]]:
    """Peers' experts behind the layer's own router."""

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


def _exact(moe: MoEMLP, x: Tensor, grad: Tensor, backward: bool) -> list[Tensor]:
    """The reference in float64: y, or y and the gradients of x and every parameter."""
    double = copy.deepcopy(moe).double()
    with ops.use_backend("torch"):
        if not backward:
            return _as_list(forward(double, x.double())())
        return _as_list(forward_backward(double, double, x.double(), grad.double())())


def _as_list(outputs: Tensor | dict[str, Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [outputs[n] for n in sorted(outputs)]
