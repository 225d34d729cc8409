"""Modules whose weights are 8-bit integers, in the places of those of a trained encoder's layers.

They compute what the modules that they replace compute in inference, with the products of
:mod:`moe_fast.ops.int8_weight`; the residual stream, norms, softmax and routing stay in float32.
Where the library multiplies bfloat16, attention is computed in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_fast import compat, ops
from moe_fast.layers.attention import ATTENTION
from moe_fast.layers.moe_mlp import MoEMLP, OutputBlock
from moe_fast.ops import native
from moe_fast.ops.activations import activate
from moe_fast.ops.int8_weight import dequantize_weight, expert_of, packed_shape
from moe_fast.ops.plan_checks import experts_with_rows


class Int8Matrix(nn.Module):
    """A weight [N, K] of 8-bit integers with its bias, or E of them, held as buffers.

    Attributes:
        values, scale, sums: the :class:`moe_fast.ops.Int8Weight`.
        bias: [..., N] float32 or ``None``.
        input_range: [2] float32, the range of the inputs if it is fixed, else ``None``.
        in_features: K.
        seen: while the model is calibrated, the least and the greatest input so far.
    """

    values: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None
    input_range: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, static: bool = False) -> None:
        """Quantise a weight [..., N, K]; of one on the device "meta" only the shapes are used."""
        super().__init__()
        *lead, rows, columns = weight.shape
        self.in_features, self.out_features = columns, rows
        if weight.is_meta:
            shape = (*lead, *packed_shape(rows, columns))
            quantized = ops.Int8Weight(
                torch.empty(shape, dtype=torch.int8, device="meta"),
                torch.empty(*lead, rows, device="meta"),
                torch.empty(*lead, rows, dtype=torch.int32, device="meta"),
            )
        else:
            quantized = ops.quantize_weight(weight)
        for name in ("values", "scale", "sums"):
            self.register_buffer(name, getattr(quantized, name))
        copied = None if bias is None else bias.detach().to(torch.float32, copy=True)
        self.register_buffer("bias", copied)
        fixed = torch.tensor([-1.0, 1.0], device=weight.device) if static else None
        self.register_buffer("input_range", fixed)
        self.seen: tuple[float, float] | None = None

    @property
    def weight(self) -> ops.Int8Weight:
        """The weight, as the ops take it."""
        return ops.Int8Weight(self.values, self.scale, self.sums)

    def num_weights(self) -> int:
        """How many numbers the weight and the bias hold, without the padding of the packing."""
        return self.scale.numel() * self.in_features + (self.bias is not None) * self.scale.numel()

    def observe(self, x: Tensor) -> None:
        """Extend the range that was seen by that of ``x``, while the model is calibrated."""
        if self.seen is not None and x.numel():
            low, high = self.seen
            self.seen = min(low, x.min().item()), max(high, x.max().item())

    def linear(
        self, x: Tensor, norm: ops.Int8Norm | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Map x [..., K] to [..., N]; a ``norm`` has a residual of the same shape."""
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"hidden_states must end in {self.in_features}; got shape {list(x.shape)}."
            )
        self.observe(x)
        shape = (*x.shape[:-1], self.out_features)
        if norm is not None and norm.residual is not None:
            norm = norm._replace(residual=norm.residual.reshape(-1, self.out_features))
        y = ops.int8_linear(
            x.reshape(-1, self.in_features),
            self.weight,
            self.bias,
            input_range=self.input_range,
            norm=norm,
            dtype=dtype,
        )
        return y.view(shape)

    @compat.overrides
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As ``nn.Module``'s, but the scales stay float32 when the model is cast."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        """The sizes that ``print(module)`` shows."""
        experts = f"{self.scale.shape[0]} experts, " if self.scale.dim() == 2 else ""
        fixed = "static" if self.input_range is not None else "dynamic"
        return f"{experts}{self.in_features} -> {self.out_features}, int8, {fixed}"


class Int8Linear(Int8Matrix):
    """In the place of an ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., K] to [..., N] in x's dtype."""
        return self.linear(x)


class Int8SelfAttention(nn.Module):
    """In the place of BERT's self-attention: queries, keys and values by one product."""

    def __init__(self, dense: Any, *, static: bool = False) -> None:
        super().__init__()
        parts = (dense.query, dense.key, dense.value)
        weight = torch.cat([part.weight.detach() for part in parts])
        self.qkv = Int8Matrix(weight, torch.cat([p.bias.detach() for p in parts]), static=static)
        self.config = dense.config
        self.attention_head_size = dense.attention_head_size
        self.scaling = dense.attention_head_size**-0.5
        self.is_causal = False
        self.eager = sys.modules[type(dense).__module__].eager_attention_forward

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As the dense module's, for inference."""
        name = compat.attention_of(self.config)
        in_bf16 = name == ATTENTION and hidden_states.is_cpu and multiplies_bf16()
        qkv = self.qkv.linear(hidden_states, dtype=torch.bfloat16 if in_bf16 else None)
        parts = qkv.unflatten(-1, (3, -1, self.attention_head_size)).unbind(-3)
        query, key, value = (part.transpose(1, 2) for part in parts)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, self.eager)
        kwargs.pop("cache", None)
        kwargs.pop("encoder_hidden_states", None)
        y, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return y.flatten(-2), weights


class Int8SelfOutput(nn.Module):
    """In the place of the module behind BERT's attention: ``LayerNorm(dense(x) + residual)``."""

    def __init__(self, module: Any, *, static: bool = False) -> None:
        super().__init__()
        self.dense = Int8Matrix(module.dense.weight, module.dense.bias, static=static)
        self.LayerNorm = module.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """As the dense module's, for inference."""
        after = self.LayerNorm
        norm = ops.Int8Norm(input_tensor, after.weight, after.bias, after.eps)
        return self.dense.linear(hidden_states, norm, input_tensor.dtype)


class Int8MoEMLP(MoEMLP):
    """In the place of a :class:`MoEMLP`; the router stays as it is."""

    def __init__(self, mlp: MoEMLP, *, static: bool = False) -> None:
        nn.Module.__init__(self)
        for name in (
            *("hidden_size", "intermediate_size", "num_experts", "num_experts_per_tok"),
            *("hidden_act", "gated", "target", "expert_form", "lora_rank", "lora_alpha"),
        ):
            setattr(self, name, getattr(mlp, name))
        for name in (self.up_name, "down_proj"):
            weight, bias = mlp.projection(name)
            self.add_module(name, Int8Matrix(weight, bias, static=static))
        self.output_bias = mlp.output_bias
        self.router = mlp.router

    def reset_parameters(self) -> None:
        """Raise ``ValueError``: there is nothing to initialise."""
        raise ValueError("an int8 mixture cannot be initialised: quantise a trained one.")

    def projection(self, name: str) -> Any:
        """The weight and the bias of the projection ``name``, as float32 tensors."""
        matrix = getattr(self, name)
        return dequantize_weight(matrix.weight, matrix.in_features), matrix.bias

    def _shared_linear(self, name: str, x: Tensor) -> Tensor:
        matrix: Int8Matrix = getattr(self, name)
        return matrix.linear(x)

    def _expert_linear(self, name: str, x: Tensor, weights: Tensor, plan: Any) -> Tensor:
        matrix: Int8Matrix = getattr(self, name)
        matrix.observe(x)
        return ops.int8_expert_linear(
            x, matrix.weight, matrix.bias, weights, plan, input_range=matrix.input_range
        )

    def _expert_mlp(
        self, x: Tensor, weights: Tensor, plan: ops.RoutingPlan, block: OutputBlock | None
    ) -> Tensor:
        up: Int8Matrix = getattr(self, self.up_name)
        down: Any = self.down_proj
        self._observe(x, up, down, plan)
        norm = None
        if block is not None:
            norm = ops.Int8Norm(
                block.residual.reshape(x.shape), block.weight, block.bias, block.eps
            )
        return ops.int8_expert_mlp(
            x,
            up.weight,
            down.weight,
            up.bias,
            down.bias,
            weights,
            plan,
            act=self.hidden_act,
            gated=self.gated,
            input_range=up.input_range,
            hidden_range=down.input_range,
            norm=norm,
        )

    def _observe(self, x: Tensor, up: Int8Matrix, down: Int8Matrix, plan: ops.RoutingPlan) -> None:
        if up.seen is None:
            return
        up.observe(x)
        for e, here in experts_with_rows(plan.expert_offsets):
            weight, bias = expert_of(up.weight, up.bias, e)
            z = ops.int8_linear(x[plan.row_to_token[here]], weight, bias)
            down.observe(activate(z, self.hidden_act, self.gated))


def multiplies_bf16() -> bool:
    """Whether the library computes attention in bfloat16 on this processor."""
    return "bfloat16" in native.cpu_capability


# transformers' copies of BERT's self-attention, whose forwards are the same.
_BERT_ATTENTION = tuple(
    f"{name}SelfAttention"
    for name in ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "XLMRobertaXL")
)


def to_int8(module: nn.Module, *, static: bool = False) -> None:
    """Replace all linear maps and mixtures in an encoder's layer, in place."""
    for name, child in list(module.named_children()):
        new: nn.Module | None = None
        if isinstance(child, MoEMLP):
            new = Int8MoEMLP(child, static=static)
        elif type(child).__name__ in _BERT_ATTENTION:
            new = Int8SelfAttention(child, static=static)
        elif _is_self_output(child):
            new = Int8SelfOutput(child, static=static)
        elif type(child) is nn.Linear:
            new = Int8Linear(child.weight, child.bias, static=static)
        if new is None:
            to_int8(child, static=static)
        else:
            setattr(module, name, new.train(child.training))


def _is_self_output(module: nn.Module) -> bool:
    """Whether a module is a copy of BERT's, with a dense map, dropout and LayerNorm."""
    parts = dict(module.named_children())
    return (
        type(module).__name__.endswith("SelfOutput")
        and parts.keys() == {"dense", "dropout", "LayerNorm"}
        and type(parts["LayerNorm"]) is nn.LayerNorm
        and type(parts["dense"]) is nn.Linear
    )
