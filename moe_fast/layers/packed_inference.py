"""PackedInference: the forward of post-norm layers on packed texts, without gradients, on a CPU.

A layer's attention and its norm are one operation (:func:`moe_fast.ops.attention_block`), and so
are the sum and the norm after the experts (:func:`moe_fast.ops.add_norm`). The sums that run from
layer to layer, the residual stream, are kept in float32 beside the hidden states: products of a
bfloat16 model are computed in bfloat16, but what they are added to is not rounded in between.
Layers take and return hidden states in the model's dtype all the same.

A layer whose modules would do anything else is computed module by module: those with forward hooks
or another forward, subclasses of ``Linear`` and ``LayerNorm`` (adapters, quantised weights), and
dense layers. Its input is then the rounded hidden states, as without this file.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_fast import compat, ops
from moe_fast.layers.routing_info import RoutingInfo
from moe_fast.ops import backends
from moe_fast.ops.checks import COMPILED_DTYPES
from moe_fast.ops.eager_dispatch import nobody_looks

_TORCH_MODULES = (nn.Linear, nn.LayerNorm, nn.Dropout)


class _Parts(NamedTuple):
    """What a layer consists of, besides its experts."""

    projections: ops.Projections
    attention_norm: nn.LayerNorm
    norm: nn.LayerNorm
    head_dim: int
    scale: float


class PackedInference:
    """One forward through the layers of an encoder; each forward makes its own.

    Args:
        cu_seqlens: [B + 1], the starts of the texts.
    """

    def __init__(self, cu_seqlens: Tensor) -> None:
        self._cu_seqlens = cu_seqlens.to(torch.int64)
        # The hidden states that a layer returned, and the same before rounding.
        self._rounded: Tensor | None = None
        self._exact: Tensor | None = None

    @classmethod
    def of_call(cls, dtype: torch.dtype, cu_seqlens: Tensor) -> PackedInference | None:
        """For the current call of an encoder of this dtype; ``None`` where it does not suit."""
        suits = (
            cu_seqlens.is_cpu
            and dtype in COMPILED_DTYPES
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and nobody_looks()
            and backends.default_backend("attention_block", cu_seqlens.device, dtype) == "cpp"
        )
        return cls(cu_seqlens) if suits else None

    def run(
        self,
        layer: Any,
        x: Tensor,
        attention_mask: Tensor | None,
        routing: RoutingInfo,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """Compute a layer: hidden states [1, T, D] to [1, T, D].

        Returns:
            The result, or ``None``: the layer must be computed module by module.
        """
        parts = _parts_of(layer) if attention_mask is None and type(x) is Tensor else None
        if parts is None or parts.projections.query.dtype != x.dtype:
            return None
        rotation = None
        if "position_embeddings" in kwargs:
            cos, sin = kwargs["position_embeddings"]
            if cos.shape != (1, x.shape[1], parts.head_dim):  # only a part of each head is rotated
                return None
            rotation = cos[0], sin[0]
        norm = parts.attention_norm
        y, residual = ops.attention_block(
            x[0],
            self._exact if self._exact is not None and x is self._rounded else x[0],
            parts.projections,
            norm.weight,
            norm.bias,
            self._cu_seqlens,
            heads=parts.projections.query.shape[0] // parts.head_dim,
            scale=parts.scale,
            rotation=rotation,
            eps=norm.eps,
        )
        y = layer.mlp(y[None], routing=routing)
        norm = parts.norm
        out, self._exact = ops.add_norm(y[0], residual, norm.weight, norm.bias, eps=norm.eps)
        self._rounded = out[None]
        return self._rounded


def _parts_of(layer: Any) -> _Parts | None:
    """The parts of a layer that computes nothing else than :meth:`PackedInference.run` does."""
    architecture = layer.architecture
    if getattr(layer.config, "quantization", None) is not None:  # its modules are others
        return None
    shape = None
    if architecture.projections is not None and not layer.training:
        maps = [layer.get_submodule(name) for name in architecture.projections]
        inner = layer.get_submodule(architecture.projections[0].rpartition(".")[0])
        shape = _head_dim_and_scale(inner)
    if shape is None or not _computes_only_this(layer):
        return None
    projections = ops.Projections(*(m.weight for m in maps), *(m.bias for m in maps))
    norms = [
        layer.get_submodule(name)
        for name in (
            architecture.projections_norm or architecture.attention_norm,
            architecture.norm,
        )
    ]
    dtype = projections.query.dtype
    parameters = (*projections, *(t for norm in norms for t in (norm.weight, norm.bias)))
    plain = all(
        t is None or (type(t) in (nn.Parameter, Tensor) and t.is_cpu and t.dtype == dtype)
        for t in parameters
    )
    affine = all(type(norm) is nn.LayerNorm and norm.weight is not None for norm in norms)
    if not (plain and affine and all(type(m) is nn.Linear for m in maps)):
        return None
    return _Parts(projections, norms[0], norms[1], *shape)


def _head_dim_and_scale(attention: Any) -> tuple[int, float] | None:
    """The width of the heads of a module of attention, and the factor on its scores.

    ``None`` where it has no attributes of the known names; its own forward then runs.
    """
    for name in ("attention_head_size", "head_dim"):
        head_dim, scale = getattr(attention, name, None), getattr(attention, "scaling", None)
        if isinstance(head_dim, int) and isinstance(scale, float):
            return head_dim, scale
    return None


def _computes_only_this(layer: Any) -> bool:
    """Whether the replaced modules are transformers' and torch's own, without hooks.

    They are all modules of the attention, and the norms and dropouts of both blocks.
    """
    parts = layer.architecture
    theirs = parts.dense_layer.__module__
    modules = list(layer.get_submodule(parts.attention).modules())
    for name in (parts.attention_norm, parts.attention_dropout, parts.norm, parts.dropout):
        if name is not None:
            modules.append(layer.get_submodule(name))
    return all(
        (type(module) in _TORCH_MODULES or type(module).__module__ == theirs)
        and not module.training
        and "forward" not in vars(module)  # of this instance alone
        for module in modules
    ) and compat.are_unhooked(modules)
