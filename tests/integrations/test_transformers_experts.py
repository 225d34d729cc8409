"""transformers' own MoE models with experts_implementation="moe_fast", against their eager form."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssModel,
    MixtralConfig,
    MixtralModel,
    OlmoeConfig,
    OlmoeModel,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    Qwen3MoeConfig,
    Qwen3MoeModel,
)

import moe_fast
from moe_fast import ops
from moe_fast.integrations import transformers_experts

COMMON = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_experts_per_tok=2,
    pad_token_id=0,
)
MODELS = {
    "mixtral": lambda: MixtralModel(MixtralConfig(**COMMON, num_local_experts=3)),
    "qwen2_moe": lambda: Qwen2MoeModel(
        Qwen2MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=12)
    ),
    "qwen3_moe": lambda: Qwen3MoeModel(
        Qwen3MoeConfig(**COMMON, num_experts=4, moe_intermediate_size=12, head_dim=8)
    ),
    "olmoe": lambda: OlmoeModel(OlmoeConfig(**COMMON, num_experts=5)),
    "gpt_oss": lambda: GptOssModel(
        GptOssConfig(**COMMON, num_local_experts=3, head_dim=8, layer_types=["full_attention"] * 2)
    ),
}


def random_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():  # some architectures start with zeros or tiny values
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The output and every gradient."""
    ids = torch.arange(1, 15).view(2, 7)
    y = model(ids).last_hidden_state
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    model.zero_grad()
    (y * weights).sum().backward()
    return {"y": y.detach()} | {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_same_output_and_gradients_as_eager(name, backend):
    eager, ours = random_model(name), random_model(name)
    eager.set_experts_implementation("eager")
    ours.set_experts_implementation("moe_fast")
    with moe_fast.use_backend(backend):
        expected, actual = run(eager), run(ours)
    assert actual.keys() == expected.keys()
    assert any("experts" in key for key in expected)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_which_models_are_fused(name, monkeypatch):
    """expert_mlp where it knows the gate, expert_linear around a gate of the model's own."""
    assert called_by(random_model(name), monkeypatch) == {"expert_mlp"}


def test_other_constants_of_the_clamp_are_not_fused(monkeypatch):
    model = random_model("gpt_oss")
    for experts in model.modules():
        if hasattr(experts, "limit"):
            experts.limit = 6.0
    assert called_by(model, monkeypatch) == {"expert_linear"}


def called_by(model: torch.nn.Module, monkeypatch) -> set[str]:
    """The ops that the experts run on."""
    called = []
    for op in ("expert_mlp", "expert_linear"):
        original = getattr(ops, op)
        monkeypatch.setattr(
            ops, op, lambda *a, op=op, f=original, **kw: (called.append(op), f(*a, **kw))[1]
        )
    model.set_experts_implementation("moe_fast")
    run(model)
    return set(called)


def experts_of(name: str) -> torch.nn.Module:
    model = random_model(name)
    model.set_experts_implementation("moe_fast")
    return next(m for n, m in model.named_modules() if n.endswith("experts"))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_sentinel_ids_are_skipped(name):
    """An id >= E gives what the same token gives without that slot, and no gradient."""
    experts = experts_of(name)
    size = experts.num_experts
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [2, size], [size, size + 3]])
    weights = torch.rand(3, 2, dtype=torch.float64)
    y = experts(x, index, weights)
    alone = experts(x, index[1:2, :1].repeat(3, 1), weights[1:2, :1].repeat(3, 1))
    torch.testing.assert_close(y[1], alone[1])
    assert (y[2] == 0).all()
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad[2] == 0).all() and grad[:2].any(1).all()


def test_half_precision_weights_and_post_expert_norm():
    """A norm behind each expert is applied to rows, before their weights; skipped rows stay 0."""
    experts = copy.deepcopy(experts_of("mixtral")).float()
    experts.has_post_expert_norm = True
    experts.post_expert_norm = torch.nn.LayerNorm(16)
    torch.nn.init.normal_(experts.post_expert_norm.bias)
    x, index = torch.randn(4, 16), torch.tensor([[0, 1], [2, 0], [1, 3], [3, 3]])
    weights = torch.rand(4, 2).bfloat16()
    y = transformers_experts.experts_forward(experts, x, index, weights)
    expected = torch.zeros(4, 16)
    for t in range(4):
        for k, e in enumerate(index[t].tolist()):
            if e < experts.num_experts:
                z = experts.gate_up_proj[e] @ x[t]
                h = torch.nn.functional.silu(z[: len(z) // 2]) * z[len(z) // 2 :]
                expected[t] += weights[t, k] * experts.post_expert_norm(experts.down_proj[e] @ h)
    torch.testing.assert_close(y, expected)
