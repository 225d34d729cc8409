"""The first weights of multi-head blocks, which are new: none come from the dense MLP.

A head's expert sees h = D / n entries of a token where the dense MLP sees all D, so no choice gives
the dense model's output. Of those that were tried, small random weights change a trained encoder
least; docs/multi-head.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_fast.architectures import encoder_prefix
from moe_fast.layers import MoEMultiHeadMLP
from moe_fast.models.pretrained import MoEPreTrainedModel


def multi_head_weights(
    moe: MoEPreTrainedModel, model: PreTrainedModel, seed: int
) -> dict[str, Tensor]:
    """All weights of a mixture's multi-head blocks but the routers', by their names in its state.

    They are normal with the model's ``initializer_range``, biases are 0; drawn on the CPU, so that
    they are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer, mlp in moe.moe_mlps().items():
        if not isinstance(mlp, MoEMultiHeadMLP):
            continue
        for name, parameter in mlp.named_parameters():
            if name.startswith("router."):
                continue
            value = torch.zeros(parameter.shape, dtype=torch.float32)
            if not name.endswith("bias"):
                value.normal_(std=moe.config.initializer_range, generator=generator)
            place = encoder_prefix(moe) + moe.architecture.join(layer, f"mlp.{name}")
            weights[place] = value.to(device=model.device, dtype=model.dtype)
    return weights
