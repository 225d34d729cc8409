"""Checks that training changes the model: trainable weights, gradients and precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from moe_fast.models.quantization import check_not_quantized

_HALF = (torch.float16, torch.bfloat16)
_REMEDY = (
    "Make trainable what is to be trained: model.requires_grad_(True), "
    'moe_fast.conversion.set_trainable(model.transformers_model, "experts") or, for a saved '
    "adapter, load it with is_trainable=True; on the command line: --trainable all."
)


def check_trainable(model: nn.Module) -> None:
    """Raise an error if the model has no trainable parameter.

    Parameters of a loss, such as a temperature, do not count, because they do not change the model.

    Raises:
        ValueError: every parameter of the model is frozen, or it is quantised; the error names
            remedies.
    """
    encoder = getattr(model, "transformers_model", model)
    check_not_quantized(encoder, "trained")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"every parameter of the model is frozen: nothing would train. {_REMEDY}")


def check_reached(model: nn.Module) -> None:
    """Raise an error if no weight of the model has a gradient after the first backward pass.

    Raises:
        ValueError: no trainable parameter has a gradient; the error names some of them.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if all(p.grad is None for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "the loss depends on no trainable parameter of the model: nothing would train. "
            f"Trainable are {len(trainable)} parameters, {', '.join(trainable[:4])}"
            f"{', ...' if len(trainable) > 4 else ''}. {_REMEDY}"
        )


def check_precision(model: nn.Module, loss: nn.Module | Mapping[str, nn.Module]) -> None:
    """Check the precision of the weights to be trained; frozen weights may have any precision.

    Updates below about 1/256 (bfloat16) or 1/2048 (float16) of a weight are lost by rounding, and
    the updates of AdamW are about as large as the learning rate. Autocast (``bf16=True``) keeps the
    weights in float32 and computes in half precision. bfloat16 weights give a warning.

    Raises:
        ValueError: float16 weights are to be trained, whose gradients overflow as well.
    """
    modules = [model, *(loss.values() if isinstance(loss, Mapping) else [loss])]
    found = {
        p.dtype
        for module in modules
        for p in module.parameters()
        if p.requires_grad and p.dtype in _HALF
    }
    remedy = (
        "Call model.float() before making the loss and the trainer; args bf16=True or fp16=True "
        "compute in half precision on float32 weights."
    )
    if torch.float16 in found:
        raise ValueError(
            "the weights to be trained are float16: gradients overflow, and most updates are "
            f"rounded away. {remedy}"
        )
    if found:
        warnings.warn(
            "the weights to be trained are bfloat16, in which most updates are rounded away (those "
            f"below 1/256 of the weight). {remedy}",
            stacklevel=2,
        )


def precisions(parameters: Iterable[Any]) -> list[str]:
    """Return the sorted names of the half-precision types among the parameters' dtypes."""
    return sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.dtype in _HALF})
