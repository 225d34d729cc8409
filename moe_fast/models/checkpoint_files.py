"""The files of a checkpoint: what is damaged is named before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from moe_fast.models.json_files import read_json, read_modules, read_object

_CONFIG = "config.json"
# What loading reads; other files in the folder are nobody's concern.
_JSON_FILES = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json"),
    *("config_sentence_transformers.json", "sentence_*_config.json"),
    *("tokenizer.json", "vocab.json", "special_tokens_map.json"),
)
_WEIGHT_FILES = ("model*.safetensors", "adapter_model*.safetensors")
_MODULES_WITH_FILES = ("Transformer", "Pooling", "Dense")
_DENSE_WEIGHTS = (SAFE_WEIGHTS_NAME, "pytorch_model.bin")
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("vocab_size", "max_position_embeddings"),
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")  # safetensors' names
_INTEGER_BUFFERS = ("position_ids", "token_type_ids", "num_batches_tracked")
_OF_INT8 = ("values", "sums")  # of moe_fast/layers/int8.py


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Raise unless the files of a local model folder can be read; hub ids pass.

    Configurations and tokenizer files (its own and its sentence-transformers modules') must be
    JSON, weights files as long as their headers say (the header is all that is read of them), and
    every shard that an index names must be there.

    Raises:
        ValueError: naming the file and what is wrong with it.
        FileNotFoundError: for a missing ``config.json``, weights file or shard.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    _check_files(folder)
    modules = folder / "modules.json"
    if modules.exists():
        _check_modules(modules)
    else:
        _check_encoder_files(folder)


def shortened(names: list[str], limit: int = 10) -> str:
    """Names for a message: all of a few, the first of many with the number of the rest."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def stored_weights(folder: Path) -> dict[str, str]:
    """All weights in a folder's safetensors files, as :func:`stored_dtypes` gives those of one."""
    return {name: d for file in weight_files(folder) for name, d in stored_dtypes(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder that transformers reads."""
    if (folder / SAFE_WEIGHTS_NAME).exists():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.exists():
        return []
    return [folder / name for name in sorted(set(read_index(index).values()))]


def stored_dtypes(file: Path) -> dict[str, str]:
    """The weights of a safetensors file by name, each with safetensors' name of its dtype."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


def _check_files(folder: Path) -> None:
    for patterns, check in ((_JSON_FILES, read_object), (_WEIGHT_FILES, check_safetensors)):
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
            check(file)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists() and not (folder / SAFE_WEIGHTS_NAME).exists():  # else it is not read
        _check_shards(index)


def _check_encoder_files(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():  # PEFT's: the base model lies elsewhere
        return
    if not (folder / _CONFIG).exists():
        raise FileNotFoundError(
            f"{folder} has no {_CONFIG}: it is no saved model, or a half-written one."
        )
    if not any((*folder.glob("*.safetensors*"), *folder.glob("*.bin*"))):
        raise FileNotFoundError(
            f"{folder} has a {_CONFIG} but no weights ({SAFE_WEIGHTS_NAME}, or "
            f"{SAFE_WEIGHTS_INDEX_NAME} with its shards): it is half-written."
        )
    _check_sizes(folder)


def _check_sizes(folder: Path) -> None:
    """What a configuration promises must be of the size and kind of what is stored."""
    config = read_object(folder / _CONFIG)
    if config.get("quantization_config") is not None:
        return
    dtypes = stored_weights(folder)
    known = (*_INTEGER_BUFFERS, *(_OF_INT8 if config.get("quantization") is not None else ()))
    integers = [
        f"{name} ({dtype})"
        for name, dtype in sorted(dtypes.items())
        if dtype in _INTEGERS and name.rpartition(".")[2] not in known
    ]
    if integers:
        raise ValueError(
            f"{folder} holds whole numbers or truth values where weights must be floating numbers, "
            f"and no quantization_config says what they mean: {shortened(integers)}."
        )
    for name in _SIZES:  # of what kind a size is, the library that reads it knows
        if isinstance(config.get(name), int) and config[name] < 1:
            raise ValueError(f"{folder / _CONFIG}: {name} must be at least 1; got {config[name]}.")
    layers = config.get("num_hidden_layers")
    if dtypes and isinstance(layers, int) and layers > len(dtypes):
        raise ValueError(
            f"{folder / _CONFIG}: num_hidden_layers={layers}, but only {len(dtypes)} weights are "
            "stored."
        )


def check_safetensors(file: Path) -> None:
    """Raise ``ValueError`` unless a file is safetensors and as long as its header says."""
    if file.suffix in _PICKLES:
        raise ValueError(
            f"{file} may hold a pickle, which can run any code when it is read. Where you trust "
            "it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'model.safetensors')."
        )
    if not file.is_file():
        raise ValueError(f"{file} must be a file of weights; it is a folder, or no file.")
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or half-written ({file.stat().st_size} bytes): {error}."
        ) from None


def read_index(index: Path) -> dict[str, str]:
    """The weight map of a shard index: parameter name -> file name, which has no folder in it.

    Raises:
        ValueError: unless the file is JSON with a ``weight_map`` of names.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: it is damaged.")
    for name in weight_map.values():
        plain = isinstance(name, str) and name == PurePath(name).name and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: its weight_map must name safetensors files beside it; got {name!r}."
            )
    return weight_map


def _check_shards(index: Path) -> None:
    """Every shard must be there, hold what the index says, and be named by it."""
    folder, weight_map = index.parent, read_index(index)
    named = sorted(set(weight_map.values()))
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is half-written: {index.name} names files that are not there: "
            f"{shortened(missing)}."
        )
    for name in named:
        check_safetensors(folder / name)
        wanted = {key for key, file in weight_map.items() if file == name}
        lacking = sorted(wanted - stored_dtypes(folder / name).keys())
        if lacking:
            raise ValueError(
                f"{folder / name} lacks weights that {index.name} says it holds: "
                f"{shortened(lacking)}."
            )
    present = {file.name for file in folder.glob("model-?????-of-?????.safetensors")}
    extra = sorted(present - set(named))
    if extra:
        raise ValueError(
            f"{folder} holds shards that {index.name} does not name, and which nobody would read: "
            f"{shortened(extra)}. Remove them, or give the index that belongs to them."
        )


def _check_modules(modules: Path) -> None:
    """The folders of sentence-transformers' modules; some kinds have no files, and no folder."""
    width = None  # of what the module before gives, where it is an encoder
    for path, kind in read_modules(modules):
        folder = modules.parent / path
        if not folder.is_dir() and kind in _MODULES_WITH_FILES:
            raise FileNotFoundError(
                f"{modules.parent} is half-written: {modules.name} names the folder "
                f"{path!r}, which is not there."
            )
        if folder != modules.parent:
            _check_files(folder)
        if kind == "Transformer":
            _check_encoder_files(folder)
        if kind in _MODULES_WITH_FILES[1:] and not (folder / _CONFIG).is_file():
            raise FileNotFoundError(f"{folder} has no {_CONFIG}: it is half-written.")
        if kind == "Pooling":
            _check_pooling(folder / _CONFIG, width)
        width = _width(folder / _CONFIG) if kind == "Transformer" else None
        if kind == "Dense" and not any((folder / name).is_file() for name in _DENSE_WEIGHTS):
            raise FileNotFoundError(f"{folder} has no weights ({_DENSE_WEIGHTS[0]}).")


def _width(config: Path) -> Any:
    """The width of an encoder, where its configuration calls it as most do."""
    return read_object(config).get("hidden_size") if config.is_file() else None  # an adapter


def _check_pooling(file: Path, width: Any) -> None:
    """Sizes that a pooling states, and those of the encoder before it; None where not known."""
    config = read_object(file)
    for name in ("word_embedding_dimension", "embedding_dimension"):
        size = config.get(name, 1)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{file}: {name} must be a whole number above 0; got {size!r}.")
        if name in config and isinstance(width, int) and size != width:
            raise ValueError(
                f"{file}: {name} must be the encoder's hidden_size, {width}; got {size}."
            )
