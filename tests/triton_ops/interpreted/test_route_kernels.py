"""The router's kernels: NaN around every input and in padding, guards around every output.

Against the oracle, token by token in float64, in problems of several programs: 32 tokens and 64
dimensions each.
"""

from __future__ import annotations

import pytest
import torch
from moe_fast.triton_ops.route import route
from moe_fast.triton_ops.route_grad import route_backward
from moe_fast.triton_ops.top_k import RouteSettings

from tests.ops import oracle
from tests.ops.helpers import TOLERANCES, assert_close, gradients, leaves

from .rows import guarded

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
STARTS = torch.tensor([0, 1, 1, 40, 75])  # a sentence of one token, one without, one of 39
CASES = [
    # dtype, T, E, D, k, weights, sentences, dense, mask
    (F64, 75, 5, 67, 2, "renormalize", False, False, True),
    (F32, 75, 16, 64, 1, "straight_through", True, False, True),
    (BF16, 75, 2, 130, 2, "probability", True, False, False),
    (F32, 75, 17, 7, 17, "probability", False, True, True),
    (F64, 75, 3, 64, 1, "one", False, False, False),
    (BF16, 33, 7, 70, 3, "renormalize", False, False, True),
    (F32, 1, 1, 1, 1, "straight_through", False, False, False),
]


@pytest.mark.parametrize("case", CASES)
def test_route_and_its_gradients(case):
    dtype, tokens, experts, dim, k, weight_mode, sentences, dense, masked = case
    x = guarded(torch.randn(tokens, dim, dtype=F64).to(dtype))
    weight = guarded((torch.randn(experts, dim, dtype=F64) * dim**-0.5).to(dtype))
    mask = torch.rand(tokens) < 0.8 if masked else None
    if masked:
        x[~mask] = float("nan")
    mode = "dense" if dense else "sentence_topk" if sentences else "token_topk"
    wide = leaves(x=x.double(), router_weight=weight.double())
    expected = oracle.route(
        **wide, num_experts_per_tok=k, mode=mode, weight_mode=weight_mode, token_mask=mask,
        cu_seqlens=STARTS if sentences else None,
    )  # fmt: skip

    acc = F64 if dtype == F64 else F32
    settings = RouteSettings(k, weight_mode, sentences, dense)
    starts = STARTS if sentences else None
    weights, logits, index, counts = route(x, weight, settings, mask, starts, acc)
    assert torch.equal(index, expected.top_k_index)
    assert torch.equal(counts, expected.tokens_per_expert)
    exact = TOLERANCES[acc]  # of the rounded inputs; sums are never narrower
    assert_close(weights, expected.top_k_weights, exact, "weights")
    assert_close(logits, expected.router_logits, exact, "logits")

    upstream = [guarded(torch.randn(t.shape, dtype=acc)) for t in (weights, logits)]
    grads = gradients(
        [expected.top_k_weights, expected.router_logits], [u.double() for u in upstream], wide
    )
    actual = route_backward(*upstream, x, weight, logits, settings, mask, starts)
    for ours, name in zip(actual, ("x", "router_weight"), strict=True):
        assert_close(ours, grads[name].nan_to_num(0), TOLERANCES[dtype], f"gradient of {name}")
