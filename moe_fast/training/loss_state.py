"""Saves and loads a loss's own tensors, such as a learned temperature, with a checkpoint.

sentence-transformers' trainer saves the model but not the loss, whose parameters would be reset
when a run is resumed. Here they are saved in one safetensors file, which is written completely or
not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from sentence_transformers.base.model import BaseModel
from torch import Tensor, nn

from moe_fast.files import atomic_write

LOSS_STATE_NAME = "loss_state.safetensors"


def own_state(
    loss: nn.Module | Mapping[str, nn.Module], *, keep_vars: bool = False
) -> dict[str, Tensor]:
    """Return a loss's parameters and persistent buffers without those of its encoders.

    A mapping of losses gives the keys ``{name}.{key}``. The tensors share the loss's memory; with
    ``keep_vars`` they are its parameters and buffers themselves.
    """
    if isinstance(loss, Mapping):
        return {
            f"{name}.{key}": tensor
            for name, part in loss.items()
            for key, tensor in own_state(part, keep_vars=keep_vars).items()
        }
    modules = loss.named_modules(remove_duplicate=False)
    encoders = tuple(f"{name}." for name, module in modules if isinstance(module, BaseModel))
    state = loss.state_dict(keep_vars=keep_vars)
    return {k: v for k, v in state.items() if not k.startswith(encoders)}


def save_loss_state(loss: nn.Module | Mapping[str, nn.Module], folder: str | Path) -> None:
    """Write ``loss_state.safetensors`` into ``folder``; no file for a loss without a state."""
    state = own_state(loss)
    if not state:
        return
    data = save({key: tensor.detach().cpu().clone() for key, tensor in state.items()})
    with atomic_write(Path(folder) / LOSS_STATE_NAME) as partial:
        partial.write_bytes(data)


def load_loss_state(loss: nn.Module | Mapping[str, nn.Module], folder: str | Path) -> None:
    """Copy the tensors that :func:`save_loss_state` wrote into the loss's tensors.

    Raises:
        FileNotFoundError: the loss has a state, and the folder has no ``loss_state.safetensors``.
        ValueError: the saved tensors have other names or shapes, so they are another loss's.
    """
    state = own_state(loss)
    path = Path(folder) / LOSS_STATE_NAME
    if not path.is_file():
        if not state:
            return
        raise FileNotFoundError(
            f"the checkpoint {str(folder)!r} has no {LOSS_STATE_NAME}, which the loss needs for "
            f"its {sorted(state)}: it was not saved by MoESentenceTransformerTrainer with this "
            "loss, and going on would silently reset them."
        )
    saved = load_file(path)
    theirs, ours = (
        {key: tuple(tensor.shape) for key, tensor in tensors.items()} for tensors in (saved, state)
    )
    if theirs != ours:
        raise ValueError(
            f"{path} belongs to another loss: it holds {theirs}, this loss has {ours} "
            "(names and shapes). Use the loss and settings the checkpoint was trained with."
        )
    with torch.no_grad():
        for key, tensor in state.items():
            tensor.copy_(saved[key])
