"""Forward functions for encoders whose own forward does not pass keywords to the layers.

Routing is passed to the layers as keywords. Each function computes the same as transformers'
forward, and passes the keywords that it does not know to the layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from moe_fast import compat

_bidirectional_mask = compat.bidirectional_mask()


def mpnet(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    **routing: Any,
) -> BaseModelOutputWithPooling:
    """As ``MPNetModel.forward``."""
    config = model.config
    x = model.embeddings(
        input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
    )
    encoded = model.encoder(
        x,
        attention_mask=_bidirectional_mask(
            config=config, inputs_embeds=x, attention_mask=attention_mask
        ),
        output_attentions=_asked(output_attentions, config.output_attentions),
        output_hidden_states=_asked(output_hidden_states, config.output_hidden_states),
        return_dict=True,
        **routing,
    )
    pooler = model.pooler
    return BaseModelOutputWithPooling(
        pooler_output=None if pooler is None else pooler(encoded.last_hidden_state), **encoded
    )


def deberta(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    **routing: Any,
) -> BaseModelOutput:
    """As ``DebertaModel.forward`` and ``DebertaV2Model.forward``."""
    config, encoder = model.config, model.encoder
    like = input_ids if input_ids is not None else inputs_embeds
    mask = attention_mask
    if mask is None:
        assert like is not None  # the mixture has checked it
        mask = torch.ones(like.shape[:2], device=like.device)
    x = model.embeddings(
        input_ids=input_ids,
        token_type_ids=token_type_ids,
        position_ids=position_ids,
        mask=mask,
        inputs_embeds=inputs_embeds,
    )
    wants_attentions = _asked(output_attentions, config.output_attentions)
    shared = {
        "relative_pos": encoder.get_rel_pos(x),
        "rel_embeddings": encoder.get_rel_embedding(),
        "output_attentions": wants_attentions,
    }
    pairs = encoder.get_attention_mask(mask)
    convolution = getattr(encoder, "conv", None)  # DeBERTa v2 has one after its first layer
    states, attentions = [x], []
    for i, layer in enumerate(encoder.layer):
        own = routing if i in config.moe_layers else {}  # a dense layer takes no other keywords
        x, weights = layer(x, pairs, **shared, **own)
        if i == 0 and convolution is not None:
            x = convolution(states[0], x, mask if mask.dim() <= 2 else mask.sum(-2) > 0)
        states.append(x)
        attentions.append(weights)
    wants_states = _asked(output_hidden_states, config.output_hidden_states)
    return BaseModelOutput(
        last_hidden_state=x,
        hidden_states=tuple(states) if wants_states else None,
        attentions=tuple(attentions) if wants_attentions else None,
    )


def _asked(given: bool | None, setting: bool) -> bool:
    return setting if given is None else given
