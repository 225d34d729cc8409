"""ops.route against the router of transformers' models, and a plain softmax with top-K.

Both compute the softmax over all experts before they choose, and renormalise; ours is set to give
the same weights. If logits are equal up to rounding, choices may differ; therefore the check
compares sorted weights, which agree nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fast import ops

from .cases import OURS, Candidates, Case, near
from .record import Work

EXPERTS = 8
# Logits have unit scale. float32 allows for rounding, bf16 also for that of a peer's product.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def cases(size: str) -> Iterator[Case]:
    """Yield token routing, forward."""
    tokens, dim, dtypes = [16, 512, 8192], 384, list(TOLERANCES)
    if size == "tiny":
        tokens, dim = [16], 8
    elif size == "full":
        tokens, dim = [16, 512, 8192, 65536], 768
    for t, k, dtype in product(tokens, (1, 2), dtypes):
        read = (t + EXPERTS) * dim * dtype.itemsize
        yield Case(
            "route, forward",
            {"T": t, "D": dim, "E": EXPERTS, "K": k},
            str(dtype).removeprefix("torch."),
            partial(candidates, t, dim, k, dtype),
            # The product; reads x and the weight, writes logits, K ids and K weights.
            Work(2 * t * dim * EXPERTS, read + t * (4 * EXPERTS + (8 + 4) * k)),
        )


def candidates(tokens: int, dim: int, k: int, dtype: torch.dtype) -> Candidates:
    """Make ours and two peers on random tokens; each returns its weights [T, K]."""
    x = torch.randn(tokens, dim).to(dtype)
    weight = (torch.randn(EXPERTS, dim) / dim**0.5).to(dtype)

    def ours() -> list[Tensor]:
        # For K = 1 renormalised weights are always 1, so there would be nothing to compare.
        mode = "probability" if k == 1 else "renormalize"
        return [ops.route(x, weight, k, weight_mode=mode).top_k_weights]

    def top_k(logits: Tensor) -> list[Tensor]:
        weights = torch.softmax(logits, -1).topk(k).values
        return [weights if k == 1 else weights / weights.sum(-1, keepdim=True)]

    runs = {OURS: ours, "softmax, top-k": lambda: top_k(F.linear(x, weight).float())}
    if k > 1:  # for K = 1 its weights are always 1
        router = transformers_router(weight, k)
        runs["transformers' router"] = lambda: [router(x)[1]]
    exact = top_k(x.double() @ weight.double().T)
    calls = {name: torch.no_grad()(run) for name, run in runs.items()}
    return Candidates(calls, near(exact, TOLERANCES[dtype]))


def transformers_router(weight: Tensor, k: int) -> nn.Module:
    """Return Mixtral's router with ``weight``; it returns logits, weights and ids."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    config = MixtralConfig(
        hidden_size=weight.shape[1], num_local_experts=weight.shape[0], num_experts_per_tok=k
    )
    router = MixtralTopKRouter(config)
    router.weight = nn.Parameter(weight)
    return router
