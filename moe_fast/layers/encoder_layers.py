"""Drop-in encoder layers: transformers' own, their MLP replaced by a mixture of experts.

Same constructor, inputs and outputs as the class each one extends. Routing travels in ``**kwargs``
(``expert_ids``, ``token_mask``, ``cu_seqlens``, or one ``routing``) and is taken out before the
attention sees it. A bare layer without ``token_mask`` treats every token as real.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaLayer

from moe_fast.layers.moe_mlp import MoEMLP, OutputBlock
from moe_fast.layers.routing_info import RoutingInfo

# What the mixture's layers ask of a configuration beyond a dense layer's.
_NEEDED = ("num_experts", "num_experts_per_tok", "routing", "weight_mode", "target")


def _check_config(config: PreTrainedConfig) -> None:
    """Refuse, before anything is built, what these layers do not do."""
    name = type(config).__name__
    missing = [field for field in _NEEDED if not hasattr(config, field)]
    if missing:
        own = name if name.startswith("MoE") else f"MoE{name}"
        raise ValueError(
            f"config must have {', '.join(missing)}, as an {own} has; got {name}. Make one with "
            f"moe_fast.models.{own}(num_experts=4, ...) and the settings of yours, or a mixture "
            "of a trained model with moe_fast.upcycle(model, num_experts=4)."
        )
    if getattr(config, "is_decoder", False):
        raise ValueError("config.is_decoder must be False: moe_fast layers are encoders; got True.")
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            "config.add_cross_attention must be False: moe_fast layers have no cross-attention; "
            "got True."
        )
    chunk = getattr(config, "chunk_size_feed_forward", 0)
    if chunk:
        raise ValueError(
            "config.chunk_size_feed_forward must be 0: routing needs the whole batch at once; "
            f"got {chunk}."
        )
    dropout = getattr(config, "mlp_dropout", 0.0)
    if dropout:
        raise ValueError(
            "config.mlp_dropout must be 0: experts have no dropout between their projections; "
            f"got {dropout}."
        )


def _moe_mlp(config: PreTrainedConfig, hidden_act: str, gated: bool, bias: bool) -> MoEMLP:
    return MoEMLP(
        config.hidden_size,
        config.intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        hidden_act=hidden_act,
        gated=gated,
        bias=bias,
        routing=config.routing,
        weight_mode=config.weight_mode,
        target=config.target,
    )


class _AddNorm(nn.Module):
    """BERT's output block without its projection: dropout, residual, LayerNorm."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(hidden_states) + residual)

    def onto(self, residual: Tensor) -> OutputBlock:
        """The same as an argument of the MLP that computes it."""
        norm, dropout = self.LayerNorm, self.dropout
        return OutputBlock(
            residual, norm.weight, norm.bias, norm.eps, dropout.p if dropout.training else 0.0
        )


class _PostNormMoELayer:
    """What the BERT, RoBERTa and XLM-RoBERTa layers share.

    ``config.fused_output``, which may change at any time, says whether the MLP computes the output
    block too; forward hooks of the modules in ``output`` do not run then.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int | None = None) -> None:
        _check_config(config)
        super().__init__(config, layer_idx)
        self.config = config
        del self.intermediate
        self.mlp = _moe_mlp(config, config.hidden_act, gated=False, bias=True)
        self.output = _AddNorm(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, L, D] to [B, L, D]; routing keywords as in the module's docstring."""
        decoder_inputs = {
            "encoder_hidden_states": encoder_hidden_states,
            "cache": cache,
            "past_key_values": kwargs.pop("past_key_values", None),  # before transformers 5.24
        }
        for name, value in decoder_inputs.items():
            if value is not None:
                raise ValueError(f"{name} must be None: moe_fast layers are encoders; got a value.")
        routing = RoutingInfo.pop_from(kwargs)
        x, _ = self.attention(hidden_states, attention_mask, **kwargs)
        if self.config.fused_output:
            return self.mlp(x, routing=routing, output_block=self.output.onto(x))
        return self.output(self.mlp(x, routing=routing), x)


class MoEBertLayer(_PostNormMoELayer, BertLayer):
    """transformers' ``BertLayer`` with a :class:`MoEMLP`; ``config`` as :class:`MoEBertConfig`."""


class MoERobertaLayer(_PostNormMoELayer, RobertaLayer):
    """transformers' ``RobertaLayer`` with a :class:`MoEMLP`."""


class MoEXLMRobertaLayer(_PostNormMoELayer, XLMRobertaLayer):
    """transformers' ``XLMRobertaLayer`` with a :class:`MoEMLP`."""


class MoEModernBertLayer(ModernBertEncoderLayer):
    """transformers' ``ModernBertEncoderLayer`` with a gated :class:`MoEMLP`."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int | None = None) -> None:
        _check_config(config)
        super().__init__(config, layer_idx)
        self.mlp = _moe_mlp(config, config.hidden_activation, gated=True, bias=config.mlp_bias)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [B, L, D] to [B, L, D]; routing keywords as in the module's docstring."""
        routing = RoutingInfo.pop_from(kwargs)
        attention_output, _ = self.attn(
            self.attn_norm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.mlp_norm(hidden_states), routing=routing)
