"""route refuses what does not fit, naming the argument, what was given and what is allowed."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops

from .helpers import assert_says
from .test_route import F64, MODES, WEIGHT_MODES, D, E


def good(mode="token_topk", **changes) -> dict:
    """Arguments of a valid call, some of them replaced."""
    enforced = mode == "enforced"
    arguments = dict(
        x=torch.randn(3, 4, D),
        router_weight=None if enforced else torch.randn(E, D),
        num_experts_per_tok=1 if enforced or mode == "sentence_switch" else 2,
        mode=mode,
        **(dict(expert_ids=torch.tensor([1, 0, 3]), num_experts=E) if enforced else {}),
    )
    return arguments | changes


IDS = torch.tensor([1, 0, 3])
NAN_X = torch.full((3, 4, D), 0.5).index_fill(1, torch.tensor([2]), float("nan"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        # argument, what was given, what is allowed
        (good(num_experts_per_tok=5), ["num_experts_per_tok", "5", "4"]),
        (good("sentence_topk", num_experts_per_tok=5), ["num_experts_per_tok", "5", "4"]),
        (good(num_experts_per_tok=0), ["num_experts_per_tok", "0", "1", "4"]),
        (good(num_experts_per_tok=-1), ["num_experts_per_tok", "-1", "1", "4"]),
        (good("sentence_switch", num_experts_per_tok=2), ["num_experts_per_tok", "2", "1"]),
        (good("enforced", num_experts_per_tok=2), ["num_experts_per_tok", "2", "1"]),
        (good("token_top_k"), ["mode", "token_top_k", *MODES]),
        (good(weight_mode="softmax"), ["weight_mode", "softmax", *WEIGHT_MODES]),
        (good(backend="cuda"), ["backend", "cuda", "auto", "torch"]),
        (good(x=torch.randn(D)), ["x", "[5]", "[T, D]", "[B, L, D]"]),
        (good(x=torch.randn(2, 3, 4, D)), ["x", "[2, 3, 4, 5]", "[T, D]", "[B, L, D]"]),
        (good(x=torch.ones(3, 4, D, dtype=torch.int64)), ["x", "int64", "float"]),
        (good(router_weight=torch.randn(E, 7)), ["router_weight", "[4, 7]", "5"]),
        (good(router_weight=torch.randn(E)), ["router_weight", "[4]", "[E, D]"]),
        (good(router_weight=None), ["router_weight", "None", "token_topk"]),
        (good(router_weight=torch.randn(E, D, dtype=F64)), ["router_weight", "float64", "float32"]),
        (good(router_weight=torch.randn(E, D, device="meta")), ["router_weight", "meta", "cpu"]),
        (good(expert_ids=IDS), ["expert_ids", "token_topk", "enforced"]),
        (good("enforced", expert_ids=None), ["expert_ids", "None", "enforced"]),
        (good("enforced", num_experts=None), ["num_experts", "None", "router_weight"]),
        (good("enforced", num_experts=0), ["num_experts", "0", "1"]),
        (good("enforced", expert_ids=IDS + 1), ["expert_ids", "4", "[0, 4)"]),
        (good("enforced", expert_ids=IDS - 1), ["expert_ids", "-1", "[0, 4)"]),
        (good("enforced", expert_ids=IDS[:2]), ["expert_ids", "[2]", "[3]", "[3, 4]"]),
        (good("enforced", expert_ids=IDS.expand(4, 3)), ["expert_ids", "[4, 3]", "[3, 4]"]),
        (good("enforced", expert_ids=IDS.float()), ["expert_ids", "float32", "int64"]),
        (good("enforced", expert_ids=IDS.to("meta")), ["expert_ids", "meta", "cpu"]),
        # [B] beside packed tokens: which sentence is a token of?
        (good("enforced", x=torch.randn(12, D)), ["expert_ids", "[3]", "[12]"]),
        (good(token_mask=torch.ones(3, 4)), ["token_mask", "float32", "bool"]),
        (good(token_mask=torch.ones(3, 5).bool()), ["token_mask", "[3, 5]", "[3, 4]"]),
        (good(token_mask=torch.ones(3, 4, device="meta").bool()), ["token_mask", "meta", "cpu"]),
        (good("sentence_topk", x=torch.randn(12, D)), ["sentence_topk", "cu_seqlens", "[12, 5]"]),
        (
            good("sentence_switch", x=torch.randn(12, D)),
            ["sentence_switch", "cu_seqlens", "[12, 5]"],
        ),
        (
            good("sentence_topk", x=torch.randn(12, D), cu_seqlens=torch.tensor([0, 3, 11])),
            ["cu_seqlens", "11", "12"],
        ),
        (
            good("sentence_topk", x=torch.randn(12, D), cu_seqlens=torch.tensor([1, 3, 12])),
            ["cu_seqlens", "1", "0"],
        ),
        (
            good("sentence_topk", x=torch.randn(12, D), cu_seqlens=torch.tensor([0, 7, 3, 12])),
            ["cu_seqlens", "7, 3"],
        ),
        (
            good("sentence_topk", x=torch.randn(12, D), cu_seqlens=torch.tensor([0.0, 12.0])),
            ["cu_seqlens", "float32", "int32", "int64"],
        ),
        (good(cu_seqlens=torch.tensor([0, 4, 8, 12])), ["cu_seqlens", "[3, 4, 5]", "[T, D]"]),
        (good(x=NAN_X), ["router logits", "NaN"]),
        (good("sentence_topk", x=NAN_X), ["router logits", "NaN"]),
        (good("dense", x=NAN_X), ["router logits", "NaN"]),
    ],
)
def test_bad_input(arguments, says):
    with pytest.raises((ValueError, TypeError)) as error:
        ops.route(**arguments)
    assert_says(error, *says)


def test_nan_in_the_router_weight_is_found_too():
    with pytest.raises(ValueError) as error:
        ops.route(**good(router_weight=torch.full((E, D), float("nan"))))
    assert_says(error, "router logits", "NaN")


def test_enforced_routing_refuses_an_unknown_backend():
    ids = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="backend must be one of"):
        ops.route(
            torch.zeros(2, 3), None, 1, mode="enforced", expert_ids=ids, num_experts=2, backend="x"
        )
