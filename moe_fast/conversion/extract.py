"""extract_expert: one expert of a mixture as a dense model of the original class."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from moe_fast.architectures import encoder_prefix
from moe_fast.compat import attention_of
from moe_fast.conversion.door import given, mixture_of
from moe_fast.conversion.weights import load_exactly, vocabulary_names
from moe_fast.models.configuration import MoEConfigFields
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.registry import build_dense


def extract_expert(model: Any, expert: int | str, *, keep_domain_tokens: bool = False) -> Any:
    """The dense model that one expert makes, everything else being shared.

    Args:
        model: a mixture, bare or with a head, or a ``MoESentenceTransformer`` (gives a
            ``SentenceTransformer``), ``MoESparseEncoder`` or ``MoECrossEncoder``.
        expert: its index in [0, E), or a domain's name (enforced routing).
        keep_domain_tokens: ``False`` folds the domain's token into [CLS] and drops the tokens, so
            that the dense model with its ordinary tokenizer gives what the mixture gives for
            that domain. ``True`` keeps the vocabulary as the mixture has it, [CLS] untouched.

    Returns:
        A new ``BertModel`` (``RobertaModel``, ``BertForMaskedLM`` ...) on the device and in the
        dtype of ``model``, which is untouched.

    Raises:
        TypeError: for a model that is no mixture.
        ValueError: for an expert that is out of range or unknown; the message lists the allowed.
            For a model with PEFT adapters: merge them first.
    """
    source = given(model)
    model = mixture_of(source)
    index = expert_index(model.config, expert)
    weights = _dense_state(model, index)
    config = _dense_config(model, keep_domain_tokens)
    with torch.device("meta"):
        dense = build_dense(config, model)
    for name in vocabulary_names(dense, weights):
        weights[name] = _folded(model.config, weights[name], index)
    load_exactly(dense, weights, buffers_of=model)
    return source.around(dense.train(model.training))


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


def _dense_state(model: MoEPreTrainedModel, expert: int) -> dict[str, Tensor]:
    architecture, mlps = model.architecture, model.moe_mlps()
    prefix, dense_names = encoder_prefix(model), architecture.mlp_names
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        layer, inner = architecture.split(name.removeprefix(prefix)) or (-1, "")
        if layer not in mlps or not inner.startswith("mlp."):
            state[name] = value.clone()
        elif inner in dense_names:
            projection = inner.removeprefix("mlp.").removesuffix("_bias")
            own = value[expert] if mlps[layer].is_expert(projection) else value
            parts = own.chunk(len(dense_names[inner]))
            for old, part in zip(dense_names[inner], parts, strict=True):
                state[prefix + architecture.join(layer, old)] = part.clone()
    return state


def _dense_config(model: MoEPreTrainedModel, keep_domain_tokens: bool) -> Any:
    config = model.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        config.pop(name, None)
    for field in fields(MoEConfigFields):
        config.pop(field.name, None)
    if not keep_domain_tokens:
        config["vocab_size"] -= len(model.config.domain_token_ids)
    config["attn_implementation"] = attention_of(model.config)
    return model.architecture.dense_config.from_dict(config)


def _folded(config: MoEConfigFields, rows: Tensor, expert: int) -> Tensor:
    """Rows of tokens without the domains'; with enforced routing the expert's is [CLS]'s."""
    kept = rows[: rows.shape[0] - len(config.domain_token_ids)].clone()
    if config.routing == "enforced":
        assert config.domain_token_replaces is not None  # there are domain tokens
        kept[config.domain_token_replaces] = rows[config.domain_token_ids[expert]]
    return kept
