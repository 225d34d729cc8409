"""Loads a model from a folder or hub id, to encode with it or to convert it."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

from moe_fast import compat
from moe_fast.encoding.adapters import adapter_folder, load_with_adapter
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.head_files import COLBERT, SPARSE, has_heads
from moe_fast.encoding.model_paths import (
    check_model_path,
    has_modules,
    is_mixture,
    model_file,
    refuse_nomic,
)
from moe_fast.models.checkpoint_files import check_checkpoint
from moe_fast.models.json_files import read_modules, read_object
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
        A ``MoESentenceTransformer`` for a mixture, a ``SentenceTransformer`` for a dense model; a
        ``MoEThreeHeadEncoder`` or ``ThreeHeadEncoder`` if the files of three heads are there.

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

    kinds = SentenceTransformer, MoESentenceTransformer
    if has_heads(path):
        from moe_fast.encoding.three_head_encoder import MoEThreeHeadEncoder, ThreeHeadEncoder

        kinds = ThreeHeadEncoder, MoEThreeHeadEncoder
    with naming(path):
        if is_mixture(path):
            return kinds[1](path, device=device)
        model = kinds[0](path, device=device)
    _check_weights(model, path)
    return model


def load_three_heads(path: str, *, device: str | None = None) -> Any:
    """Load the encoder with three heads in a folder or with a hub id, dense or a mixture.

    Args:
        path: a folder that this library saved, or one in BGE-M3's format.
        device: as in PyTorch; ``None``: a GPU if there is one, else the CPU.

    Returns:
        A :class:`moe_fast.ThreeHeadEncoder` or :class:`moe_fast.MoEThreeHeadEncoder`.

    Raises:
        FileNotFoundError: the files of the heads are missing.
        ValueError: a file is damaged, does not fit or lacks weights; the message names it.
    """
    if not has_heads(path):
        raise FileNotFoundError(
            f"model {path!r} has no heads: it needs {SPARSE} and {COLBERT}, each as .safetensors "
            "or .pt. Add new ones with moe_fast.add_three_heads."
        )
    return load_model(path, device=device)


def load_as_saved(path: str, head: str = "") -> Any:
    """The model at ``path`` as what it was saved as, on the CPU, to be converted or described.

    Args:
        path: as in :func:`load_model`; a bare encoder is returned without pooling.
        head: one of :data:`moe_fast.architectures.HEADS`, with which a bare encoder was saved;
            empty: the encoder alone.

    Returns:
        An encoder, bare or with a head, or the model of sentence-transformers that was saved:
        ``SentenceTransformer``, ``SparseEncoder`` or ``CrossEncoder``, or ours on a mixture.

    Raises:
        ValueError: as :func:`load_model`; for a ``head`` that is not in the checkpoint, and for one
            of a model of sentence-transformers, which is loaded with its own.
    """
    check_model_path(path)
    adapter = adapter_folder(path)
    if adapter is not None:
        return load_with_adapter(path, adapter, partial(load_as_saved, head=head))
    if not has_modules(path) and not has_heads(path):
        refuse_nomic(path)
        return load_encoder(path, head)
    if head:
        raise ValueError(
            f"head must be None for {path}, a model of sentence-transformers, which comes with "
            f"the head that it has; got {head!r}."
        )
    kind = _pipeline_class(path)
    if kind is None:
        return load_model(path, device="cpu")
    check_checkpoint(path)
    with naming(path):
        model = kind(path, device="cpu")
    _check_weights(model, path)
    return model


def _pipeline_class(path: str) -> type[Any] | None:
    """The class of a saved ``SparseEncoder`` or ``CrossEncoder``, stock or ours; else ``None``."""
    settings = model_file(path, "config_sentence_transformers.json")
    name = read_object(settings).get("model_type") if settings else None
    if name not in ("SparseEncoder", "CrossEncoder"):
        return None
    if not is_mixture(path):
        return getattr(importlib.import_module("sentence_transformers"), name)
    module = "sparse_encoder" if name == "SparseEncoder" else "cross_encoder"
    return getattr(importlib.import_module(f"moe_fast.encoding.{module}"), f"MoE{name}")


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
