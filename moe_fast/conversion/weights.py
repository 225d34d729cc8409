"""Functions that make the weights and settings of one model from those of others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_fast.compat import attention_of


def vocabulary_names(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> list[str]:
    """The names of weights that have a row for each token, where vocabularies differ in size.

    They are the embeddings and, of a masked language model, the matrix and the bias that predict
    tokens.

    Args:
        model: of the one vocabulary; it may lie on the meta device.
        weights: those of a model that is the same but for its vocabulary. Other names are passed
            over.
    """
    return [
        name
        for name, value in model.state_dict().items()
        if name in weights and weights[name].shape[:1] != value.shape[:1]
    ]


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
    """Load all weights into ``new``, which is on the meta device, and another's other buffers.

    Every parameter must be given, so that none keeps a random initialisation.

    Raises:
        ValueError: for weights that the configuration ties to one, and that differ.
    """
    new.load_state_dict(weights, strict=True, assign=True)
    new.tie_weights()  # each name has a tensor of its own now
    for name, value in new.state_dict().items():
        if value.data_ptr() != weights[name].data_ptr() and not torch.equal(value, weights[name]):
            raise ValueError(
                f"the model's {name} must be the weight to which its configuration ties it "
                "(tie_word_embeddings); got another one. Set config.tie_word_embeddings=False "
                "to keep both."
            )
    given = buffers_of.state_dict().keys()  # the others are not persistent
    new.name_or_path = ""  # these weights are not saved yet; PEFT saves it as the adapter's base
    for name, buffer in buffers_of.named_buffers():
        if name in given:
            continue
        module_name, _, leaf = name.rpartition(".")
        module = new.get_submodule(module_name)
        module.register_buffer(leaf, copy.deepcopy(buffer), persistent=False)
