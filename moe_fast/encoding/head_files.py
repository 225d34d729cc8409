"""The files of the lexical and the multi-vector layer: BGE-M3's ``.pt`` files, and safetensors.

A folder in BGE-M3's format is that of a SentenceTransformer with ``sparse_linear.pt`` and
``colbert_linear.pt`` beside ``modules.json``, each the state dict of one linear layer. moe_fast
writes ``sparse_linear.safetensors`` and ``colbert_linear.safetensors``, and reads them first.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_fast.encoding.model_paths import model_file
from moe_fast.ops.checks import FLOAT_DTYPES

SPARSE, COLBERT = "sparse_linear", "colbert_linear"
# Files of an earlier save, which must not outlive a new one.
REPLACED = tuple(f"{name}{end}" for name in (SPARSE, COLBERT) for end in (".safetensors", ".pt"))

State = dict[str, Tensor]


def has_heads(path: str) -> bool:
    """Whether the model at ``path``, a folder or hub id, has a file of each of the two layers."""
    return all(_file_of(path, name) is not None for name in (SPARSE, COLBERT))


def read_heads(path: str, hidden_size: int) -> tuple[State, State]:
    """Read and check the lexical and the multi-vector layer of a model.

    Args:
        path: the model's folder or hub id.
        hidden_size: D, the size of the encoder's hidden states.

    Returns:
        Two state dicts, ``weight`` [1, D] and ``bias`` [1], and ``weight`` [D', D] and ``bias``
        [D'], with the files' dtypes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file cannot be read or holds something else; the message names it.
    """
    return _read(path, SPARSE, hidden_size, 1), _read(path, COLBERT, hidden_size, None)


def write_heads(folder: str | Path, sparse: nn.Linear, colbert: nn.Linear) -> None:
    """Write both layers as safetensors files."""
    for name, layer in ((SPARSE, sparse), (COLBERT, colbert)):
        save_file(_state_of(layer), Path(folder, f"{name}.safetensors"), {"format": "pt"})


def write_bge_m3_heads(
    folder: str | Path, sparse: nn.Linear, colbert: nn.Linear, dtypes: dict[str, torch.dtype]
) -> None:
    """Write both layers as BGE-M3's ``.pt`` files.

    Args:
        dtypes: by name, the dtype of the file that a layer was read from. It is used if it holds
            the layer's values exactly, as it does until the layer is trained.
    """
    for name, layer in ((SPARSE, sparse), (COLBERT, colbert)):
        state, dtype = _state_of(layer), dtypes.get(name)
        if dtype is not None and all(_fits(tensor, dtype) for tensor in state.values()):
            state = {key: tensor.to(dtype) for key, tensor in state.items()}
        torch.save(state, Path(folder, f"{name}.pt"))


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _state_of(layer: nn.Linear) -> State:
    state = layer.state_dict()
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def _file_of(path: str, name: str) -> Path | None:
    return model_file(path, f"{name}.safetensors") or model_file(path, f"{name}.pt")


def _read(path: str, name: str, in_features: int, out_features: int | None) -> State:
    file = _file_of(path, name)
    if file is None:
        raise FileNotFoundError(
            f"model {path!r} has neither {name}.safetensors nor {name}.pt, the weights of a head. "
            "Give a dense model heads with moe_fast.add_three_heads."
        )
    state = _load(file)
    shapes = _described(state)
    if not isinstance(state, dict) or set(state) != {"weight", "bias"}:
        raise ValueError(f"{file} must hold the weight and bias of one linear layer; got {shapes}.")
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{file}: {key} must be a tensor of floats; got {shapes}.")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key} must be finite; it has NaN or infinite values.")
    rows = state["weight"].shape[0] if state["weight"].dim() == 2 else 0
    expected = out_features or rows
    fits = tuple(state["weight"].shape) == (expected, in_features) and expected >= 1
    if not fits or tuple(state["bias"].shape) != (expected,):
        outs = "D'" if out_features is None else out_features
        raise ValueError(
            f"{file}: weight and bias must have shapes [{outs}, {in_features}] and [{outs}], where "
            f"{in_features} is the encoder's hidden size; got {shapes}."
        )
    return state


def _load(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)  # runs no foreign code
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read as the weights of a layer: {reason}") from None


def _described(state: Any) -> str:
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    parts = [
        f"{key!r}: {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else f"{key!r}: a {type(value).__name__}"
        for key, value in list(state.items())[:5]
    ]
    return "{" + ", ".join(parts) + ("}" if len(state) <= 5 else ", ...}")
