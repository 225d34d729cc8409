"""Reading checkpoints: what is damaged is named before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from moe_fast.compat import file_of
from moe_fast.models.adapters import adapter_folder, load_with_adapter

_CONFIG = "config.json"
# What loading reads; other files in the folder are nobody's concern.
_JSON_FILES = ("*config*.json", "modules.json", "tokenizer.json", "vocab.json", "special_tokens*")
_WEIGHT_FILES = ("model*.safetensors", "adapter_model*.safetensors")
_MODULES_WITH_FILES = ("Transformer", "Pooling", "Dense")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load_dense(path: str) -> Any:
    """The SentenceTransformer in a folder or under a hub id, or else the bare encoder.

    Raises:
        ValueError: for a damaged file in a local folder, which the message names.
        OSError: as transformers, for what is not there.
    """
    adapter = adapter_folder(path)
    if adapter is not None:
        return load_with_adapter(path, adapter, load_dense)
    check_checkpoint(path)
    if file_of(path, "modules.json"):
        from moe_fast.integrations.sentence_transformers import load_sentence_transformer

        return load_sentence_transformer(path)
    return AutoModel.from_pretrained(path)


def tokenizer_beside(path: str) -> Any:
    """The tokenizer in the same folder or under the same hub id; ``None`` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None


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


def _check_files(folder: Path) -> None:
    for pattern in _JSON_FILES:
        for file in sorted(folder.glob(pattern)):
            _read_json(file)
    for pattern in _WEIGHT_FILES:
        for file in sorted(folder.glob(pattern)):
            check_safetensors(file)
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


def check_safetensors(file: Path) -> None:
    """Raise ``ValueError`` unless a file is safetensors and as long as its header says."""
    if file.suffix in _PICKLES:
        raise ValueError(
            f"{file} may hold a pickle, which can run any code when it is read. Where you trust "
            "it, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'model.safetensors')."
        )
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or half-written ({file.stat().st_size} bytes): {error}."
        ) from None


def read_index(index: Path) -> dict[str, str]:
    """The weight map of a shard index: parameter name -> file name.

    Raises:
        ValueError: unless the file is JSON with a ``weight_map`` of names.
    """
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: it is damaged.")
    return weight_map


def _check_shards(index: Path) -> None:
    missing = [
        name
        for name in sorted(set(read_index(index).values()))
        if not (index.parent / name).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} is half-written: {index.name} names files that are not there: "
            f"{', '.join(missing)}."
        )


def _check_modules(modules: Path) -> None:
    """The folders of sentence-transformers' modules; some kinds have no files, and no folder."""
    content = _read_json(modules)
    fits = isinstance(content, list) and all(
        isinstance(module, dict) and {"path", "type"} <= module.keys() for module in content
    )
    if not fits:
        raise ValueError(f"{modules} is damaged: it must list modules, each a path and a type.")
    for module in content:
        folder = modules.parent / module["path"]
        kind = module["type"].rpartition(".")[2]
        if not folder.is_dir() and kind in _MODULES_WITH_FILES:
            raise FileNotFoundError(
                f"{modules.parent} is half-written: {modules.name} names the folder "
                f"{module['path']!r}, which is not there."
            )
        if folder != modules.parent:
            _check_files(folder)
        if kind == "Transformer":
            _check_encoder_files(folder)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged or half-written; it is not JSON: {error}.") from None
