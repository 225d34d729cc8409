"""nomic-embed-text-v2-moe in plain PyTorch, text by text and token by token, and small files of it.

Written after https://github.com/nomic-ai/contrastors (src/contrastors/layers/block.py and moe.py,
models/huggingface/modeling_hf_nomic_bert.py) and the NomicBERT of text-embeddings-inference; shares
nothing with the package. Weights by their names in the file, settings by those in ``config.json``.
"""

import json
import math

import torch
from safetensors.torch import save_file

# config.json of nomic-ai/nomic-embed-text-v2-moe, its sizes apart.
CONFIG = {
    "_name_or_path": "nomic-ai/nomic-xlm-2048",
    "activation_function": "gelu",
    "add_pooling_layer": False,
    "architectures": ["NomicBertModel"],
    "attn_pdrop": 0.0,
    "auto_map": {
        "AutoConfig": "nomic-ai/nomic-bert-2048--configuration_hf_nomic_bert.NomicBertConfig",
        "AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel",
    },
    "bos_token_id": None,
    "causal": False,
    "dense_seq_output": True,
    "embd_pdrop": 0.1,
    "eos_token_id": None,
    "expert_choice_router": False,
    "ffn_div": 1,
    "fused_bias_fc": True,
    "fused_dropout_add_ln": True,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "model_type": "nomic_bert",
    "moe_every_n_layers": 2,
    "moe_impl": "megablocks",
    "moe_normalize_expert_weights": False,
    "moe_resid_pdrop": 0.0,
    "moe_top_k": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_inner": 48,
    "n_layer": 5,
    "n_positions": 40,
    "num_experts": 4,
    "num_shared_experts": 0,
    "pad_token_id": 1,
    "pad_vocab_size_multiple": 64,
    "parallel_block": False,
    "parallel_block_tied_norm": False,
    "prenorm": False,
    "qkv_proj_bias": True,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "rotary_emb_base": 10000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "router_aux_loss_coef": 0.1,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "torch_dtype": "float32",
    "transformers_version": "4.44.2",
    "type_vocab_size": 1,
    "use_cache": True,
    "use_flash_attn": True,
    "use_rms_norm": None,
    "use_xentropy": True,
    "vocab_size": 64,
}
PROMPTS = {"query": "search_query: ", "passage": "search_document: "}
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "search_query:", "search_document:"]
PIECES += [f"w{i}" for i in range(50)]


def random_weights(dtype=torch.float32, seed=0):
    """Weights of the names and shapes of the published file, in small; no two alike."""
    d, h, e = CONFIG["n_embd"], CONFIG["n_inner"], CONFIG["num_experts"]
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG["vocab_size"], d),
        "embeddings.token_type_embeddings.weight": (1, d),
        "emb_ln.weight": (d,),
        "emb_ln.bias": (d,),
    }
    for i in range(CONFIG["n_layer"]):
        layer = {
            "attn.Wqkv.weight": (3 * d, d),
            "attn.Wqkv.bias": (3 * d,),
            "attn.out_proj.weight": (d, d),
            "attn.out_proj.bias": (d,),
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "norm2.weight": (d,),
            "norm2.bias": (d,),
        }
        if i % 2 == 1:
            layer["mlp.router.layer.weight"] = (e, d)
            layer["mlp.experts.mlp.w1"] = layer["mlp.experts.mlp.w2"] = (e * h, d)
            layer["mlp.experts.bias"] = (d,)
        else:
            layer |= {"mlp.fc1.weight": (h, d), "mlp.fc1.bias": (h,)}
            layer |= {"mlp.fc2.weight": (d, h), "mlp.fc2.bias": (d,)}
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        centre = 1.0 if ".norm" in name and name.endswith("weight") else 0.0
        weights[name] = (centre + 0.3 * torch.randn(shape, generator=generator)).to(dtype)
    return weights


def write_folder(path, weights=None, config=CONFIG, modules=True):
    """A folder as the published one, with a tokenizer of the words w0 .. w49; returns ``path``."""
    from transformers import XLMRobertaTokenizer

    path.mkdir(parents=True, exist_ok=True)
    weights = random_weights() if weights is None else weights
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    vocabulary = [(piece if i < 4 else f"▁{piece}", -float(i)) for i, piece in enumerate(PIECES)]
    XLMRobertaTokenizer(vocab=vocabulary, model_max_length=512).save_pretrained(path)
    files = {"config.json": config}
    if modules:
        kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        files |= {
            "modules.json": [
                {
                    "idx": i,
                    "name": str(i),
                    "path": p,
                    "type": f"sentence_transformers.models.{kind}",
                }
                for i, (p, kind) in enumerate(kinds.items())
            ],
            "1_Pooling/config.json": {
                "word_embedding_dimension": config["n_embd"],
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
                "include_prompt": True,
            },
            "sentence_bert_config.json": {"max_seq_length": 24, "do_lower_case": False},
            "config_sentence_transformers.json": {
                "prompts": PROMPTS,
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
        }
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content), encoding="utf-8")
    return path


def tokens(text):
    """The ids of one text: <s>, its words, </s>."""
    return torch.tensor([0, *(PIECES.index(word) for word in text.split()), 2])


def embedding(weights, text, config=CONFIG):
    """The unit vector [D] of one text, its prompt included, in float64."""
    states = hidden_states(weights, tokens(text), config)
    mean = states.mean(0)
    return mean / mean.norm()


def hidden_states(weights, ids, config=CONFIG):
    """[L, D] of the ids [L] of one text, in float64."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = _norm(x, weights, "emb_ln", config)
    for i in range(config["n_layer"]):
        layer = f"encoder.layers.{i}"
        x = _norm(x + _attention(x, weights, f"{layer}.attn", config), weights, f"{layer}.norm1")
        is_mixture = i % config["moe_every_n_layers"] == 1
        y = (_mixture if is_mixture else _mlp)(x, weights, f"{layer}.mlp", config)
        x = _norm(x + y, weights, f"{layer}.norm2")
    return x


def _norm(x, weights, name, config=CONFIG):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]).sqrt()
    return centred / scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _gelu(z):
    return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))


def _attention(x, weights, name, config):
    length, heads = len(x), config["n_head"]
    size = config["n_embd"] // heads
    qkv = _linear(x, weights, f"{name}.Wqkv").view(length, 3, heads, size)
    q, k, v = qkv.unbind(1)
    out = torch.zeros_like(v)
    for head in range(heads):
        queries, keys = (_rotated(part[:, head], config) for part in (q, k))
        out[:, head] = (queries @ keys.T / math.sqrt(size)).softmax(-1) @ v[:, head]
    return _linear(out.reshape(length, -1), weights, f"{name}.out_proj")


def _rotated(x, config):
    """Position p turns the plane of places i and i + size/2 of [L, size] by p base^(-2i/size)."""
    half = x.shape[-1] // 2
    frequency = float(config["rotary_emb_base"]) ** (-torch.arange(half).double() / half)
    angle = torch.arange(len(x)).double()[:, None] * frequency
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)


def _mlp(x, weights, name, config):
    return _linear(_gelu(_linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def _mixture(x, weights, name, config):
    experts, size = config["num_experts"], config["n_inner"]
    w1, w2 = (weights[f"{name}.experts.mlp.{w}"].view(experts, size, -1) for w in ("w1", "w2"))
    out = []
    for token in x:
        share = (weights[f"{name}.router.layer.weight"] @ token).softmax(0)
        y = weights[f"{name}.experts.bias"]
        for expert in share.topk(config["moe_top_k"]).indices:
            y = y + share[expert] * (_gelu(w1[expert] @ token) @ w2[expert])
        out.append(y)
    return torch.stack(out)
