"""DomainPredictor: which domain a text belongs to, from its tokens alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_fast.layers.routing_info import token_mask_of
from moe_fast.models.configuration import MoEConfigFields

NAME = "domain_predictor"
"""The attribute of an encoder that holds its predictor, and the configuration's field."""


class DomainPredictor(nn.Module):
    """A linear classifier of texts: every token has a score for every domain.

    The logit of domain c for a text of tokens t_1 ... t_n, special tokens and prompt included, is
    the mean of its tokens' scores, plus a bias:

        logit[c] = bias[c] + (weight[t_1, c] + ... + weight[t_n, c]) / n

    Its softmax is the probability of the domain. Scores and biases are buffers: they are saved with
    the encoder's weights, and training does not change them. They are summed in float32 (float64
    where they are), whatever the dtype of the encoder.

    Args:
        vocab_size: V, the number of tokens without the domains' own.
        num_domains: C.

    Attributes:
        weight: [V, C], the scores.
        bias: [C].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, vocab_size: int, num_domains: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(vocab_size, num_domains))
        self.register_buffer("bias", torch.zeros(num_domains))

    def forward(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """The logits [B, C] of B texts.

        Args:
            tokens: [T] int64, the tokens of all texts, one text behind the other.
            starts: [B] int64, where each text starts in them; each has at least one token.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        scores = F.embedding_bag(tokens, self.weight.to(dtype), starts, mode="mean")
        return scores + self.bias.to(dtype)


def predicted_domains(config: MoEConfigFields) -> list[str]:
    """The domains that a mixture's predictor knows, in the order of its columns; may be none."""
    return list((config.domain_predictor or {}).get("domains", ()))


def add_predictor(encoder: Any) -> None:
    """Give an encoder the predictor that its configuration says it has, without its scores."""
    if (fitted := encoder.config.domain_predictor) is not None:
        encoder.domain_predictor = DomainPredictor(fitted["vocab_size"], len(fitted["domains"]))


def predictor_of(encoder: Any) -> DomainPredictor:
    """The predictor of a mixture's encoder, which must know all of its domains.

    Raises:
        ValueError: there is none, or domains have been added since it was fitted; the message says
            what to do.
    """
    config = encoder.config
    known = predicted_domains(config)
    if not known:
        raise ValueError(
            "domain='auto' needs a domain predictor, and the model has none: fit one with "
            "model.fit_domain_predictor(texts, domains), or name the domain."
        )
    if new := [name for name in config.domains if name not in known]:
        raise ValueError(
            f"domain='auto' needs a domain predictor that knows all domains; {', '.join(new)} came "
            "after it was fitted. Fit it again with model.fit_domain_predictor(texts, domains), "
            "with texts of all domains, or name the domain."
        )
    return getattr(encoder.base_model, NAME)


def predicted_domain_ids(
    encoder: Any, input_ids: Tensor | None, attention_mask: Any, cu_seqlens: Tensor | None
) -> Tensor:
    """The most probable domain of each text of a batch, [B] int64 indices into its domains.

    Args:
        encoder: a bare mixture.
        input_ids: [B, L], or [1, T] of a packed batch.
        attention_mask: [B, L], 1 for real tokens; with another shape, or ``None``, all are.
        cu_seqlens: [B + 1], where the texts of a packed batch start.

    Raises:
        ValueError: as :func:`predictor_of`, and for ``inputs_embeds`` in place of ids.
    """
    predictor = predictor_of(encoder)
    if input_ids is None:
        raise ValueError("domain='auto' needs input_ids, which it is read from; got inputs_embeds.")
    real = token_mask_of(attention_mask)
    if cu_seqlens is not None:
        tokens, starts = input_ids[0], cu_seqlens[:-1].to(torch.int64)
    elif real is None:
        tokens = input_ids.reshape(-1)
        starts = torch.arange(len(input_ids), device=tokens.device) * input_ids.shape[1]
    else:
        counts = real.sum(1)
        tokens, starts = input_ids[real], counts.cumsum(0) - counts
    return in_order_of_domains(encoder.config, predictor(tokens, starts)).argmax(1)


def in_order_of_domains(config: MoEConfigFields, logits: Tensor) -> Tensor:
    """The columns of a predictor's logits in the order of the model's domains."""
    known = predicted_domains(config)
    return logits[:, [known.index(name) for name in config.domains]]
