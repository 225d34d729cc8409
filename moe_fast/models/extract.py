"""extract_expert: one expert of a mixture as a dense model of the original class."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_fast.compat import attention_of
from moe_fast.models.architectures import Architecture, architecture_of
from moe_fast.models.configuration import MoEConfigFields
from moe_fast.models.modeling import MoEModelMixin
from moe_fast.models.weights import check_no_adapter, embedding_name, load_exactly


def extract_expert(model: Any, expert: int | str, *, keep_domain_tokens: bool = False) -> Any:
    """The dense model that one expert makes, everything else being shared.

    Args:
        model: a mixture, or a ``MoESentenceTransformer`` (gives a ``SentenceTransformer``).
        expert: its index in [0, E), or a domain's name (enforced routing).
        keep_domain_tokens: ``False`` folds the domain's token into [CLS] and drops the tokens, so
            that the dense model with its ordinary tokenizer gives what the mixture gives for
            that domain. ``True`` keeps the vocabulary as the mixture has it, [CLS] untouched.

    Returns:
        A new ``BertModel`` (``RobertaModel`` ...) on the device and in the dtype of ``model``,
        which is untouched.

    Raises:
        TypeError: for a model that is no mixture.
        ValueError: for an expert that is out of range or unknown; the message lists the allowed.
            For a model with PEFT adapters: merge them first.
    """
    if not isinstance(model, PreTrainedModel) and hasattr(model, "encode"):
        # A SentenceTransformer holds its encoder in its first module; that floor lies above this.
        from moe_fast.integrations.sentence_transformers import extract_sentence_transformer

        return extract_sentence_transformer(model, expert, keep_domain_tokens=keep_domain_tokens)
    if not isinstance(model, MoEModelMixin):
        raise TypeError(f"model must be a mixture of experts; got {type(model).__name__}.")
    check_no_adapter(model)
    index = expert_index(model.config, expert)
    architecture = architecture_of(model)
    weights = _dense_state(architecture, model, index)
    config = _dense_config(architecture, model, keep_domain_tokens)
    if not keep_domain_tokens:
        _fold_domain_token(model, weights, index)
    with torch.device("meta"):
        dense = architecture.build_dense(config, model)
    load_exactly(dense, weights, buffers_of=model)
    return dense.train(model.training)


def expert_index(config: MoEConfigFields, expert: int | str, name: str = "expert") -> int:
    """The index of an expert given by it or by its domain; ``name`` is the argument's.

    Raises:
        TypeError, ValueError: as :func:`extract_expert`.
    """
    if isinstance(expert, str):
        if config.routing != "enforced":
            raise ValueError(
                f"{name} must be an index where routing is learned (a domain has no expert of its "
                f"own); got {expert!r} and routing={config.routing!r}."
            )
        return config.domain_id(expert)
    if isinstance(expert, bool) or not isinstance(expert, int):
        raise TypeError(f"{name} must be an int or a domain's name; got {expert!r}.")
    if not 0 <= expert < config.num_experts:
        raise ValueError(f"{name} must lie in [0, {config.num_experts}); got {expert}.")
    return expert


def _dense_state(
    architecture: Architecture, model: MoEModelMixin, expert: int
) -> dict[str, Tensor]:
    dense_names = {new: old for old, new in architecture.mlp_names.items()}
    mlps = model.moe_mlps()
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        place = architecture.split(name)
        if place is None or place[0] not in mlps or not place[1].startswith("mlp."):
            state[name] = value.clone()
        elif place[1] in dense_names:
            layer, inner = place
            projection = inner.removeprefix("mlp.").removesuffix("_bias")
            own = value[expert] if mlps[layer].is_expert(projection) else value
            state[f"{architecture.layer_prefix}{layer}.{dense_names[inner]}"] = own.clone()
    return state


def _dense_config(
    architecture: Architecture, model: MoEModelMixin, keep_domain_tokens: bool
) -> Any:
    config = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        config.pop(name, None)
    for field in fields(MoEConfigFields):
        config.pop(field.name, None)
    if not keep_domain_tokens:
        config["vocab_size"] -= len(model.config.domain_token_ids)
    config["attn_implementation"] = attention_of(model.config)
    return architecture.dense_config.from_dict(config)


def _fold_domain_token(model: MoEModelMixin, weights: dict[str, Tensor], expert: int) -> None:
    """Drop the domains' rows; with enforced routing the expert's domain lends [CLS] its own."""
    config = model.config
    if not config.domain_token_ids:
        return
    name = embedding_name(model)
    table = weights[name]
    kept = table[: table.shape[0] - len(config.domain_token_ids)].clone()
    if config.routing == "enforced":
        kept[config.domain_token_replaces] = table[config.domain_token_ids[expert]]
    weights[name] = kept
