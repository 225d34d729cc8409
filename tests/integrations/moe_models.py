"""A small random model of every architecture of transformers whose experts can be switched.

    python -m tests.integrations.moe_models

writes the table of docs/transformers.md anew: what experts_implementation="moe_fast" makes of each,
found by trying; tests/integrations/test_registry.py compares it.
"""

import importlib
import inspect
import re
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from moe_fast import compat, ops

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
MODELS = Path(transformers.__file__).parent / "models"
SWITCH = "\n@use_experts_implementation"
LENGTH = 7
# Whatever a configuration has of it. Of several names for one size each knows its own.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 0),
    "mlp_layer_types": ["sparse", "sparse"],
    # attention of low rank, sparse attention, linear attention
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("index_topk", "index_n_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA = {"top_k_experts": 2, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_chunk_size": 4}
# What one architecture wants otherwise.
OWN_SIZES = {
    "deepseek_v4": {"mlp_layer_types": ["moe", "moe"]},
    "diffusion_gemma": GEMMA,
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
    },
    "flint": {"mlp_only_layers": []},
    "gemma4": {
        **GEMMA,
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
    },
    "glm4v_moe": {
        "head_dim": 16,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    },
    "glm5_next": {"index_topk": 4, "index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0},
    "granitemoehybrid": MAMBA,
    "hy_v4_vl": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "inkling": {"swa_head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "muse_spark": {"moe_hidden_size": 16},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe"],
        "moe_shared_expert_intermediate_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Whose forward wants float32 or computes in it, and how far rounding then takes the results apart.
IN_FLOAT32 = ("inkling2", "inkling2_loop", "openai_privacy_filter")
FLOAT32, FLOAT64 = 1e-4, 1e-6
# Where the text model has another name.
OWN_MODELS = {
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
}


def architectures():
    """Their names, as transformers' folders."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return [file.parent.name for file in files if SWITCH in file.read_text(encoding="utf-8")]


def model_class(name):
    """The class of the text model, or of the only one."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if name in OWN_MODELS:
        return getattr(module, OWN_MODELS[name])
    models = [
        cls
        for key, cls in vars(module).items()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == module.__name__
        and re.search(r"(?<!PreTrained)Model$", key)
    ]
    return next((cls for cls in models if cls.__name__.endswith("TextModel")), models[0])


def build(name, implementation):
    """In float64, dropout off, its experts of a size that is seen in the output."""
    cls = model_class(name)
    known = {
        key for base in cls.config_class.__mro__ for key in vars(base).get("__annotations__", ())
    }
    known |= set(getattr(cls.config_class, "attribute_map", {}))
    sizes = {key: value for key, value in SIZES.items() if key in known}
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**sizes, **OWN_SIZES.get(name, {})})).eval()
    if name not in IN_FLOAT32:
        model.double()
    for experts in experts_of(model):
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.set_experts_implementation(implementation)
    return model


def experts_of(model):
    """The modules that the switch is for."""
    return [m for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "has_gate")]


def run(model):
    """The output and the gradient of every parameter that has one."""
    y = model(input_ids=torch.arange(3, 3 + 2 * LENGTH).view(2, LENGTH)).last_hidden_state
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach()} | grads


def row(name):
    """What the table says of an architecture, after comparing it with eager."""
    ours = build(name, "moe_fast")
    expected, called = run(build(name, "eager")), []
    originals = {op: getattr(ops, op) for op in ("expert_mlp", "expert_linear")}
    for op, original in originals.items():
        setattr(ops, op, lambda *a, op=op, f=original, **kw: (called.append(op), f(*a, **kw))[1])
    try:
        actual = run(ours)
    finally:
        for op, original in originals.items():
            setattr(ops, op, original)
    assert actual.keys() == expected.keys() and called, (name, called)
    tolerance = FLOAT32 if name in IN_FLOAT32 else FLOAT64
    assert any(key.endswith("down_proj") and expected[key].abs().max() > 0 for key in expected)
    for key, want in expected.items():
        error = (actual[key] - want).abs().max() / want.abs().max().clamp(min=1e-12)
        assert error <= tolerance, (name, key, error.item())
    if set(called) == {"expert_mlp"}:
        return "fused"
    assert set(called) == {"expert_linear"}
    return f"unfused: {_reason(experts_of(ours)[0])}"


def _reason(experts):
    if getattr(experts, "has_post_expert_norm", False):
        return "a norm behind each expert"
    if experts.has_gate and not compat.has_usual_gate(experts):
        return "a gate of its own"
    return f"its activation, {type(experts.act_fn).__name__}"


def table_of_the_page():
    """{architecture: what the page says}."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in _lines()]
    return {name.strip("`"): said for name, said in rows[2:]}


def _lines():
    return [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]


def main():
    """Write the table anew."""
    rows = [["architecture", "experts"], ["---", "---"]]
    rows += [[f"`{name}`", row(name)] for name in architectures()]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace("\n".join(_lines()), table), encoding="utf-8")


if __name__ == "__main__":
    main()
