"""openai/privacy-filter's experts: clamped SwiGLU, biases, float32 whatever the weights' dtype."""

from __future__ import annotations

import pytest
import torch

import moe_fast

pytest.importorskip("transformers.models.openai_privacy_filter")
from transformers import OpenAIPrivacyFilterConfig, OpenAIPrivacyFilterForTokenClassification

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=8,
    sliding_window=4,
    pad_token_id=0,
    eos_token_id=0,
)


def random_model(implementation: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Weights of a size that makes z pass the limits of the clamp."""
    torch.manual_seed(0)
    config = OpenAIPrivacyFilterConfig(**SIZES)
    model = OpenAIPrivacyFilterForTokenClassification(config).eval()
    for name, parameter in model.named_parameters():
        std = 2.0 if "gate_up_proj" in name else 0.3
        torch.nn.init.normal_(parameter, std=std)
    model.set_experts_implementation(implementation)
    return model.to(dtype)


def run(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The logits and every gradient."""
    logits = model(torch.arange(1, 43).view(2, 21)).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits.dtype)
    (logits * weights).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, (what, error.item())


def test_logits_and_gradients_are_those_of_transformers_default():
    experts = next(m for m in random_model("moe_fast").modules() if hasattr(m, "limit"))
    assert (experts.alpha, experts.limit) == (1.702, 7.0)
    expected, actual = run(random_model("eager")), run(random_model("moe_fast"))
    assert actual.keys() == expected.keys() and any("experts" in key for key in expected)
    for key in expected:
        assert_near(actual[key], expected[key], 1e-5 if key == "logits" else 1e-4, key)


def oracle(experts, x, index, weights):
    """Every token through its experts, one after another, from the formulas."""
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    up, up_bias, down, down_bias = (getattr(experts, name).double() for name in names)
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t], dtype=torch.float64)
        for k, e in enumerate(index[t].tolist()):
            gate, linear = (x[t].double() @ up[e] + up_bias[e]).chunk(2)
            gate, linear = gate.clamp(max=7), linear.clamp(-7, 7)
            h = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
            y = y + weights[t, k].double() * (h @ down[e] + down_bias[e])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_experts_equal_the_oracle(dtype, backend):
    """In float32 to the last rounding: 16-bit weights are widened, not multiplied as they are."""
    experts = random_model("moe_fast", dtype).model.layers[0].mlp.experts
    x = torch.randn(40, 32, dtype=torch.float64).to(dtype).requires_grad_()
    index = torch.stack([torch.randperm(8)[:4] for _ in range(40)])
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(40, 4, dtype=wide, requires_grad=True)
    leaves = [x, weights, *experts.parameters()]
    with moe_fast.use_backend(backend):
        y = experts(x, index, weights)
        upstream = torch.randn(40, 32, dtype=torch.float64).to(dtype)
        grads = torch.autograd.grad(y, leaves, upstream)
    expected = oracle(experts, x, index, weights)
    assert y.dtype == dtype
    # A half of the last place, and once more what float32 (or float64) itself adds up to.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    assert_near(y, expected, tolerance, "y")
    for got, want in zip(
        grads, torch.autograd.grad(expected, leaves, upstream.double()), strict=True
    ):
        assert_near(got, want, tolerance, "gradient")


def test_bfloat16_logits_are_nearly_all_the_very_same():
    eager, ours = (random_model(name, torch.bfloat16) for name in ("eager", "moe_fast"))
    x, index = torch.randn(200, 32).bfloat16(), torch.randint(8, (200, 4))
    weights = torch.rand(200, 4)
    with torch.no_grad():
        expected, actual = (
            model.model.layers[1].mlp.experts(x, index, weights) for model in (eager, ours)
        )
    assert (actual == expected).float().mean() > 0.99
    assert_near(actual, expected, torch.finfo(torch.bfloat16).eps, "y")
