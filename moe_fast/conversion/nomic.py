"""import_nomic, export_nomic: the format of nomic-embed-text-v2-moe, read and written.

Its layers are those of transformers' jina-embeddings-v3: rotary positions, norms behind the sums,
biases, MLPs without a gate. In every n-th layer the MLP is a mixture: of the softmax over all
experts the K largest, not scaled to sum to 1, weight MLPs without biases, and one bias stands
behind their sum. Weights lie as megablocks keeps them. After https://github.com/nomic-ai/contrastors
and Nussbaum and Duderstadt, arXiv 2502.07972.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from moe_fast.conversion.importing import read_weights
from moe_fast.conversion.input_model import Given, given, loaded, mixture_of
from moe_fast.conversion.weights import load_exactly
from moe_fast.files import atomic_folder, check_output
from moe_fast.models import modeling
from moe_fast.models.checkpoint_files import shortened
from moe_fast.models.json_files import read_modules, read_object
from moe_fast.models.loading import naming
from moe_fast.models.modeling import MoEModelMixin

# Settings of theirs that are ours by another name: whole numbers above 0,
_SIZES = {
    "vocab_size": "vocab_size",
    "type_vocab_size": "type_vocab_size",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "num_experts": "num_experts",
    "moe_top_k": "num_experts_per_tok",
}
# and other numbers.
_NUMBERS = {
    "pad_token_id": "pad_token_id",
    "initializer_range": "initializer_range",
    "layer_norm_epsilon": "layer_norm_eps",
    "attn_pdrop": "attention_probs_dropout_prob",
    "resid_pdrop": "hidden_dropout_prob",
}
# Settings that their code knows other values of, and this encoder does not.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "model_type": ("nomic_bert",),
    "activation_function": ("gelu",),
    "add_pooling_layer": (False,),
    "causal": (False,),
    "expert_choice_router": (False,),
    "ffn_div": (1,),
    "mlp_fc1_bias": (True,),
    "mlp_fc2_bias": (True,),
    "moe_impl": ("megablocks",),
    "moe_normalize_expert_weights": (False,),
    "num_shared_experts": (0,),
    "parallel_block": (False,),
    "prenorm": (False,),
    "qkv_proj_bias": (True,),
    "rotary_emb_fraction": (1,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (None,),
    "rotary_scaling_factor": (None,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "scale_attn_weights": (True,),
    "use_rms_norm": (False, None),
}
# Settings of how their code computes and trains, and of heads: kept for the export.
_KEPT = {
    *("_name_or_path", "auto_map", "dense_seq_output", "embd_pdrop", "fused_bias_fc"),
    *("fused_dropout_add_ln", "max_trained_positions", "parallel_block_tied_norm"),
    *("reorder_and_upcast_attn", "router_aux_loss_coef", "summary_activation"),
    *("summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("bos_token_id", "eos_token_id", "tie_word_embeddings", "tokenizer_class", "torch_dtype"),
    *("use_cache", "use_flash_attn", "use_xentropy"),
}
_READ = ("moe_every_n_layers", "moe_resid_pdrop", "pad_vocab_size_multiple", "rotary_emb_base")

# Parts of a layer, theirs and ours, with a weight and a bias each.
_LAYER = {
    "attn.Wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.o_proj",),
    "norm1": ("post_attention_layernorm",),
    "norm2": ("post_mlp_layernorm",),
}
_DENSE_MLP = {"mlp.fc1": ("mlp.fc1",), "mlp.fc2": ("mlp.fc2",)}
_MIXTURE = {
    "router.layer.weight": "router.weight",
    "experts.mlp.w1": "up_proj",
    "experts.mlp.w2": "down_proj",
    "experts.bias": "output_bias",
}
_UP, _DOWN = ".experts.mlp.w1", ".experts.mlp.w2"


def import_nomic(folder: str | os.PathLike[str]) -> Any:
    """The mixture in a folder of nomic-embed-text-v2-moe's format.

    The code that the folder's configuration names is not run. ``save_pretrained`` of the result
    writes a folder in our format.

    Args:
        folder: with ``config.json`` and safetensors in the format of
            https://huggingface.co/nomic-ai/nomic-embed-text-v2-moe; with a ``modules.json`` a
            SentenceTransformer of it, with its tokenizer, pooling and prompts.

    Returns:
        A ``MoESentenceTransformer``, or without ``modules.json`` a ``MoEJinaEmbeddingsV3Model``
        (whose layers these are) without a pooler; on the CPU, in the dtype of the weights.

    Raises:
        FileNotFoundError: where there is no such folder, configuration or weights file.
        ValueError: for a damaged file, a pickle, settings that are not known or that this encoder
            does not do, and weights that are missing, unknown, given twice or of other shapes.
        ImportError: the installed transformers lacks jina-embeddings-v3.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be that of a model; there is no {folder}.")
    model_class = _model_class()
    place = _encoder_folder(folder)
    theirs = read_weights(place)
    with naming(folder):
        config = model_class.config_class(**_settings(read_object(place / "config.json")))
        with torch.device("meta"):
            new = model_class(config, add_pooling_layer=False)
        weights = _our_weights(theirs, new)
        source = _around_a_stand_in(folder, place, config)
        load_exactly(new, weights, buffers_of=source.encoder)
        return source.around(new.eval())


def export_nomic(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write a mixture that :func:`import_nomic` made as a folder of the format it came in.

    Untouched weights and settings come out bit for bit as they went in. Trained ones can be read
    by whatever reads nomic-embed-text-v2-moe.

    Args:
        model: a ``MoESentenceTransformer``, or its encoder, which is written without a tokenizer.
        folder: a new or empty one.

    Raises:
        TypeError: for a model that is no mixture.
        ValueError: for one that :func:`import_nomic` did not make, or that the format cannot hold.
        FileExistsError: where ``folder`` holds something.
    """
    source = given(model)
    encoder = mixture_of(source)
    config = _their_config(encoder)
    folder = check_output(folder)
    state = encoder.state_dict()
    weights = {
        name: _joined(name, [state[part] for part in parts]).contiguous()
        for name, parts in _their_names(encoder.config).items()
    }
    with atomic_folder(folder) as temporary:
        if source.pipeline is not None:
            source.pipeline.save_pretrained(str(temporary), create_model_card=False)
            (temporary / "README.md").unlink(missing_ok=True)  # says how to load our format
        place = _encoder_folder(temporary)
        for file in place.glob("model*.safetensors*"):
            file.unlink()
        text = json.dumps(config, indent=2, sort_keys=True)
        (place / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})


def _model_class() -> type[MoEModelMixin]:
    found = getattr(modeling, "MoEJinaEmbeddingsV3Model", None)
    if found is None:
        raise ImportError(
            "nomic's mixture needs transformers' JinaEmbeddingsV3Model, whose layers it has; "
            f"transformers {transformers.__version__} lacks it. Upgrade transformers."
        )
    return found


def _encoder_folder(folder: Path) -> Path:
    modules = folder / "modules.json"
    return folder / read_modules(modules)[0][0] if modules.exists() else folder


def _settings(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of our configuration, from theirs.

    Raises:
        ValueError: naming all settings that are not known, or not as they must be.
    """
    known = {*_SIZES, *_NUMBERS, *_MUST_BE, *_KEPT, *_READ, *PreTrainedConfig().to_dict()}
    problems = [f"{name} is not known to this version" for name in sorted(theirs.keys() - known)]
    for name, allowed in _MUST_BE.items():
        if theirs.get(name, "nothing") not in allowed:
            problems.append(f"{name} must be {allowed[0]!r}; got {theirs.get(name, 'nothing')!r}")
    for name in (*_SIZES, "moe_every_n_layers", "pad_vocab_size_multiple"):
        if type(theirs.get(name)) is not int or theirs[name] < 1:
            problems.append(f"{name} must be a whole number above 0; got {theirs.get(name)!r}")
    for name in (*_NUMBERS, "moe_resid_pdrop", "rotary_emb_base"):
        if type(theirs.get(name)) not in (int, float):
            problems.append(f"{name} must be a number; got {theirs.get(name)!r}")
    problems = problems or _contradictions(theirs)
    if problems:
        raise ValueError(f"config.json is not of the known form: {'; '.join(problems)}.")
    every = theirs["moe_every_n_layers"]
    return {
        **{ours: theirs[name] for name, ours in (_SIZES | _NUMBERS).items()},
        "hidden_act": "gelu",
        "rope_parameters": {"rope_type": "default", "rope_theta": theirs["rotary_emb_base"]},
        "routing": "token_topk",
        "weight_mode": "probability",
        "target": "mlp",
        "shared_bias": True,
        "moe_layers": [i for i in range(theirs["n_layer"]) if i % every == 1],
        "nomic_config": dict(theirs),
    }


def _contradictions(theirs: Mapping[str, Any]) -> list[str]:
    """Settings that do not go together, or not in this encoder."""
    problems = []
    if theirs["n_embd"] % (2 * theirs["n_head"]):
        problems.append(
            f"n_embd must be a multiple of 2 n_head = {2 * theirs['n_head']} (rotary positions "
            f"take pairs); got {theirs['n_embd']}"
        )
    if theirs["vocab_size"] % theirs["pad_vocab_size_multiple"]:
        problems.append(
            "vocab_size must be a multiple of pad_vocab_size_multiple = "
            f"{theirs['pad_vocab_size_multiple']}; got {theirs['vocab_size']}"
        )
    if theirs["moe_resid_pdrop"] != theirs["resid_pdrop"]:
        problems.append(
            f"moe_resid_pdrop must be resid_pdrop = {theirs['resid_pdrop']} (all layers have one "
            f"dropout); got {theirs['moe_resid_pdrop']}"
        )
    return problems


def _their_config(encoder: MoEModelMixin) -> dict[str, Any]:
    """The configuration that the encoder came with, in the sizes and dtype that it has now."""
    config = encoder.config
    theirs = getattr(config, "nomic_config", None)
    if not isinstance(theirs, dict):
        raise ValueError(
            "model must come from import_nomic: its format has no place for what other mixtures "
            f"may have; got a {type(encoder).__name__} of another origin."
        )
    written = {**theirs, **{name: getattr(config, ours) for name, ours in _SIZES.items()}}
    written["torch_dtype"] = str(encoder.dtype).removeprefix("torch.")
    for name, value in _settings(written).items():
        if name != "nomic_config" and getattr(config, name) != value:
            raise ValueError(
                f"model.config.{name} must be {value!r}, all that the format can say; got "
                f"{getattr(config, name)!r}."
            )
    return written


def _their_names(config: Any) -> dict[str, tuple[str, ...]]:
    """Each of their weights, and ours that it is made of, one below the other."""
    words = ("word_embeddings", "token_type_embeddings")
    names: dict[str, tuple[str, ...]] = {
        f"embeddings.{word}.weight": (f"embeddings.{word}.weight",) for word in words
    }
    modules: dict[str, tuple[str, ...]] = {"emb_ln": ("embeddings.LayerNorm",)}
    for i in range(config.num_hidden_layers):
        parts = _LAYER if i in config.moe_layers else _LAYER | _DENSE_MLP
        for name, ours in parts.items():
            modules[f"encoder.layers.{i}.{name}"] = tuple(f"layers.{i}.{part}" for part in ours)
    for name, ours in modules.items():
        for leaf in ("weight", "bias"):
            names[f"{name}.{leaf}"] = tuple(f"{part}.{leaf}" for part in ours)
    for i in config.moe_layers:
        for name, part in _MIXTURE.items():
            names[f"encoder.layers.{i}.mlp.{name}"] = (f"layers.{i}.mlp.{part}",)
    return names


def _our_weights(theirs: dict[str, Tensor], new: MoEModelMixin) -> dict[str, Tensor]:
    """The weights of ``new``, which is on the meta device; they are taken out of ``theirs``."""
    wanted, names = new.state_dict(), _their_names(new.config)
    places = {name: [wanted[part] for part in parts] for name, parts in names.items()}
    shapes = {name: _joined(name, parts).shape for name, parts in places.items()}
    both = [name for name in names if name in theirs]
    problems = {
        "the checkpoint lacks": [name for name in names if name not in theirs],
        "the model has no place for": [name for name in theirs if name not in names],
        "shapes differ": [
            f"{name} {list(theirs[name].shape)}, not {list(shapes[name])}"
            for name in both
            if theirs[name].shape != shapes[name]
        ],
    }
    listed = [f"{what}: {shortened(those)}" for what, those in problems.items() if those]
    dtypes = {str(tensor.dtype) for tensor in theirs.values()}
    if len(dtypes) > 1:
        listed.append(f"there must be one dtype: {', '.join(sorted(dtypes))}")
    if listed:
        raise ValueError(f"checkpoint does not fit the model: {'; '.join(listed)}.")
    weights = {}
    for name, parts in names.items():
        values = _parted(name, theirs.pop(name), places[name])
        for part, value in zip(parts, values, strict=True):
            weights[part] = value.clone(memory_format=torch.contiguous_format)
    return weights


def _parted(name: str, tensor: Tensor, places: Sequence[Tensor]) -> Sequence[Tensor]:
    """Ours of one of their weights; w1 and w2 are [E * H, D], the experts one below the other."""
    if not name.endswith((_UP, _DOWN)):
        return tensor.split([len(place) for place in places])
    experts = tensor.unflatten(0, (len(places[0]), -1))
    return [experts.mT if name.endswith(_DOWN) else experts]


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Undoes :func:`_parted`."""
    if not name.endswith((_UP, _DOWN)):
        return torch.cat(list(parts))
    return (parts[0].mT if name.endswith(_DOWN) else parts[0]).flatten(0, 1)


def _around_a_stand_in(folder: Path, place: Path, config: Any) -> Given:
    """What is around the encoder: loaded from a copy of its files, with a tiny encoder in them."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.moe_layers, small.intermediate_size = 1, [0], 1
    small.vocab_size = 1 + max(0, config.pad_token_id)

    def weights(directory: str, names: list[str]) -> list[str]:
        heavy = (".safetensors", ".safetensors.index.json", ".bin", ".onnx", ".gguf")
        at_weights = Path(directory) == place
        return [n for n in names if n.startswith(".") or (at_weights and n.endswith(heavy))]

    with tempfile.TemporaryDirectory() as temporary:
        copied = Path(temporary, "model")
        shutil.copytree(folder, copied, ignore=weights)
        _model_class()(small).save_pretrained(copied / place.relative_to(folder))
        return loaded(str(copied))
