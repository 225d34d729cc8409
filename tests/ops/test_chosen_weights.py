"""chosen_weights: route's weights and their gradient, for a choice that is given."""

from __future__ import annotations

import pytest
import torch

from moe_fast import ops
from moe_fast.ops.route.chosen_weights import chosen_weights

STARTS = torch.tensor([0, 3, 4, 9])
SETTINGS = [
    ("token_topk", "straight_through", 1),
    ("token_topk", "probability", 1),
    ("token_topk", "one", 2),
    ("token_topk", "renormalize", 3),
    ("token_topk", "probability", 2),
    ("sentence_topk", "renormalize", 2),
    ("sentence_topk", "straight_through", 1),
    ("sentence_switch", "probability", 1),
]


def problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.rand(9, generator=generator) < 0.7
    return x, weight, mask


@pytest.mark.parametrize(("mode", "weight_mode", "k"), SETTINGS)
def test_of_routes_own_choice_they_are_routes_own_weights(mode, weight_mode, k):
    x, weight, mask = problem()
    sentences = {} if mode == "token_topk" else {"cu_seqlens": STARTS}
    settings = {"mode": mode, "weight_mode": weight_mode}
    routed = ops.route(x, weight, k, token_mask=mask, **settings, **sentences)
    again = chosen_weights(routed.router_logits, routed.top_k_index, **settings, **sentences)
    assert torch.equal(again, routed.top_k_weights)
    if weight_mode == "one":
        assert not again.requires_grad
        return
    upstream = torch.randn(again.shape, generator=torch.Generator().manual_seed(1)).double()
    expected, actual = (
        torch.autograd.grad(w, weight, upstream, retain_graph=True)[0]
        for w in (routed.top_k_weights, again)
    )
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)  # float64 rounding


@pytest.mark.parametrize("weight_mode", ["renormalize", "probability", "straight_through"])
def test_of_another_choice_they_are_the_definitions(weight_mode):
    logits = torch.tensor([[2.0, 0.5, -1.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    logits.requires_grad_()
    index = torch.tensor([[1, 2], [0, 2]])  # never the largest
    weights = chosen_weights(logits, index, mode="token_topk", weight_mode=weight_mode)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    chosen = torch.stack([p[0, [1, 2]], p[1, [0, 2]]])
    expected = {
        "probability": chosen,
        "renormalize": chosen / chosen.sum(1, keepdim=True),
        "straight_through": chosen / chosen.detach(),
    }[weight_mode]
    torch.testing.assert_close(weights, expected)
    upstream = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    found, wanted = (torch.autograd.grad(w, logits, upstream)[0] for w in (weights, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_padding_has_weight_and_gradient_zero():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1], [4], [2]])  # the second is padding
    weights = chosen_weights(logits, index, mode="token_topk", weight_mode="probability")
    assert weights[1].item() == 0
    (grad,) = torch.autograd.grad(weights.sum(), logits)
    assert not grad[1].any()
    assert grad[[0, 2]].abs().max() > 0


def test_bad_input_is_named():
    logits, index = torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="mode must be one of 'token_topk'.*got 'enforced'"):
        chosen_weights(logits, index, mode="enforced")
    with pytest.raises(ValueError, match="needs cu_seqlens; got None"):
        chosen_weights(logits, index, mode="sentence_topk")
    with pytest.raises(TypeError, match="top_k_index must have dtype int64, int32; got float32"):
        chosen_weights(logits, index.float(), mode="token_topk")
    with pytest.raises(ValueError, match=r"top_k_index must have shape \[T, K\]"):
        chosen_weights(logits, index[:2], mode="token_topk")
