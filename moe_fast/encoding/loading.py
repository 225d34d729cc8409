"""Loads a model from a folder or hub id, to encode with it or to convert it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from moe_fast import compat
from moe_fast.encoding.adapters import adapter_folder, load_with_adapter
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.model_paths import (
    check_model_path,
    has_modules,
    is_mixture,
    model_file,
    refuse_nomic,
)
from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.json_files import read_modules
from moe_fast.models.loading import load_encoder, naming
from moe_fast.models.strict import check_encoder_weights


def load_model(path: str, *, device: str | None = None) -> Any:
    """Load the model in a folder or with a hub id, ready to encode.

    Args:
        path: the path of a ``SentenceTransformer``, of a bare encoder, which gets mean pooling (as
            in sentence-transformers, with a warning), or of a PEFT adapter of either, which is
            merged into its base.
        device: as in PyTorch; ``None``: a GPU if there is one, else the CPU.

    Returns:
        A ``MoESentenceTransformer`` for a mixture, a ``SentenceTransformer`` for a dense model.

    Raises:
        FileNotFoundError: `path` looks like a folder that does not exist.
        OSError, ValueError: the checkpoint is incomplete, cannot be read or lacks weights.
        TypeError: the model has several encoders.
        ImportError: sentence-transformers is not installed.
    """
    check_model_path(path)
    adapter = adapter_folder(path)
    if adapter is not None:
        return load_with_adapter(path, adapter, partial(load_model, device=device))
    check_checkpoint(path)
    refuse_nomic(path)
    from moe_fast.encoding.sentence_transformer import MoESentenceTransformer, SentenceTransformer

    with naming(path):
        if is_mixture(path):
            return MoESentenceTransformer(path, device=device)
        model = SentenceTransformer(path, device=device)
    _check_weights(model, path)
    return model


def load_as_saved(path: str) -> Any:
    """As :func:`load_model`, on the CPU, but a bare encoder is returned without pooling."""
    check_model_path(path)
    adapter = adapter_folder(path)
    if adapter is not None:
        return load_with_adapter(path, adapter, load_as_saved)
    if has_modules(path):
        return load_model(path, device="cpu")
    refuse_nomic(path)
    return load_encoder(path)


def _check_weights(model: Any, path: str) -> None:
    """Raise if the checkpoint of a stock model lacks weights, which would be random."""
    check_one_encoder(model)
    encoder = model.transformers_model
    if encoder is None or compat.saves_adapter_alone(encoder):
        return
    modules = model_file(path, "modules.json")
    folder = read_modules(Path(modules))[0][0] if modules else ""
    with naming(path):
        check_encoder_weights(encoder, path, folder)
