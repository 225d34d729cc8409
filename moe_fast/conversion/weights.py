"""Functions that make the weights and settings of one model from those of others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_fast.compat import attention_of


def embedding_name(model: PreTrainedModel) -> str:
    """The state-dict name of the token embeddings."""
    embeddings = model.get_input_embeddings()
    return next(f"{n}.weight" for n, m in model.named_modules() if m is embeddings)


def config_settings(config: Any) -> dict[str, Any]:
    """A configuration's settings, for one of another class: without what says its class."""
    settings = config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        settings.pop(name, None)
    return settings | {"attn_implementation": attention_of(config)}


def mean_of(values: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape, in the dtype and on the device of the first.

    It is computed in float64 from the differences to the first tensor, so that the mean of any
    number of equal tensors is exactly that tensor.
    """
    if len(values) == 1:
        return values[0].clone()
    first = values[0].double()
    rest = torch.zeros_like(first)
    for value in values[1:]:
        rest += value.to(first) - first
    return (first + rest / len(values)).to(values[0])


def load_exactly(
    new: PreTrainedModel, weights: dict[str, Tensor], buffers_of: PreTrainedModel
) -> None:
    """Load all weights into ``new``, which is on the meta device, and another model's buffers.

    Every parameter must be given, so that none keeps a random initialisation.
    """
    new.load_state_dict(weights, strict=True, assign=True)
    saved = new.state_dict().keys()  # other buffers are not persistent
    new.name_or_path = ""  # these weights are not saved yet; PEFT saves it as the adapter's base
    for name, buffer in buffers_of.named_buffers():
        module_name, _, leaf = name.rpartition(".")
        module = new.get_submodule(module_name)
        module.register_buffer(leaf, copy.deepcopy(buffer), persistent=name in saved)
