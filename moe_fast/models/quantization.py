"""Mixtures of 8-bit integers: what their configuration says, and the modules of their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.layers.int8 import Int8Matrix, to_int8

METHODS = ("int8",)
ACTIVATIONS = ("dynamic", "static")


def check_quantization(value: Any) -> None:
    """Raise unless a configuration's ``quantization`` is ``None`` or says how it was quantised.

    Raises:
        TypeError, ValueError: naming the setting, what it is and what is allowed.
    """
    if value is None:
        return
    fields = {"method": METHODS, "activations": ACTIVATIONS}
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise TypeError(
            f"quantization must be None, or a dict of {' and '.join(fields)}; got {value!r}."
        )
    for name, allowed in fields.items():
        if value[name] not in allowed:
            raise ValueError(
                f"quantization[{name!r}] must be one of {', '.join(map(repr, allowed))}; got "
                f"{value[name]!r}."
            )


def is_quantized(model: Any) -> bool:
    """Whether a model is a mixture whose layers are 8-bit integers."""
    return getattr(getattr(model, "config", None), "quantization", None) is not None


def check_not_quantized(model: Any, what: str) -> None:
    """Raise ``ValueError`` if ``model`` is quantised and so cannot be ``what``, a participle."""
    if is_quantized(model):
        raise ValueError(
            f"an int8 mixture cannot be {what}: its weights are rounded to 8-bit integers, for "
            "inference alone. Take the mixture that it was made of, and quantise the result."
        )


def quantize_layers(layers: nn.ModuleList, quantization: dict[str, str]) -> None:
    """Replace the linear maps and mixtures of an encoder's layers, in place."""
    for layer in layers:
        to_int8(layer, static=quantization["activations"] == "static")


def freeze(model: Any) -> Any:
    """Have no parameter ask for gradients, and check that a loaded model is float32 elsewhere.

    Raises:
        ValueError: the model was loaded in another dtype.
    """
    if model.dtype != torch.float32:
        raise ValueError(
            "dtype must be float32 (or left out) for an int8 mixture, whose residual stream, norms "
            f"and embeddings are float32; got {model.dtype}."
        )
    return model.requires_grad_(False)


def check_stays_float32(convert: Callable[[Tensor], Tensor]) -> None:
    """Raise ``ValueError`` if ``convert``, which is applied to all tensors, changes float32."""
    dtype = convert(torch.zeros(())).dtype
    if dtype != torch.float32:
        raise ValueError(
            "an int8 mixture cannot be cast: its residual stream, norms and embeddings must stay "
            f"float32; got {dtype}. Attention is computed in bfloat16 where the processor has it."
        )


def num_int8_weights(model: nn.Module, experts_per_tok: int) -> tuple[int, int]:
    """How many weights and biases of integers there are, and how many of them a token visits."""
    matrices = [m for m in model.modules() if isinstance(m, Int8Matrix)]
    per_expert = sum(m.num_weights() // m.scale.shape[0] for m in matrices if m.scale.dim() == 2)
    shared = sum(m.num_weights() for m in matrices if m.scale.dim() == 1)
    return sum(m.num_weights() for m in matrices), shared + experts_per_tok * per_expert
