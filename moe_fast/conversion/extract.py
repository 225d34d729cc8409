"""extract_expert: makes a dense model of the original class from one expert of a mixture."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from moe_fast.architectures import encoder_prefix
from moe_fast.conversion.input_model import given, mixture_of
from moe_fast.conversion.weights import config_settings, load_exactly, vocabulary_names
from moe_fast.layers import MoEMLP
from moe_fast.models.configuration import MoEConfigFields
from moe_fast.models.domain_predictor import NAME as PREDICTOR
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.registry import build_dense
from moe_fast.ops import LowRank


def extract_expert(model: Any, expert: int | str, *, keep_domain_tokens: bool = False) -> Any:
    """Make a dense model from one expert and the weights that all experts share.

    The low-rank pairs of a LoRA expert are merged into its MLP.

    Args:
        model: a mixture, bare or with a head, or a ``MoESentenceTransformer`` (gives a
            ``SentenceTransformer``), ``MoESparseEncoder`` or ``MoECrossEncoder``.
        expert: its index in [0, E), or the name of its domain (enforced routing, which sends each
            text to the expert of its domain).
        keep_domain_tokens: a domain token replaces [CLS] in the texts of a domain. ``False`` copies
            the embedding of the expert's domain token to [CLS] and removes the domain tokens, so
            that the dense model with its ordinary tokenizer gives what the mixture gives for that
            domain. ``True`` keeps the mixture's vocabulary and [CLS].

    Returns:
        A new ``BertModel`` (``RobertaModel``, ``BertForMaskedLM`` ...) on the device and in the
        dtype of ``model``, which is not changed.

    Raises:
        TypeError: for a model that is no mixture.
        ValueError: for an expert that is out of range or unknown; the message lists the allowed
            ones. For a model with PEFT adapters: merge them first. For a model with a
            ``shared_bias``, because the bias belongs to all experts together. For one with
            multi-head blocks, whose experts have other shapes.
    """
    source = given(model)
    model = mixture_of(source)
    index = expert_index(model.config, expert)
    if model.config.moe_block != "mlp":
        raise ValueError(
            "model must have experts in place of whole MLPs; those of a multi-head block see parts "
            "of tokens, and are no dense model."
        )
    if model.config.shared_bias:
        raise ValueError(
            "model must have biases in its experts, if any; with shared_bias=True they share one "
            "behind their sum, and a dense MLP has no such place."
        )
    weights = dense_state(model, index)
    config = _dense_config(model, keep_domain_tokens)
    with torch.device("meta"):
        dense = build_dense(config, model)
    for name in vocabulary_names(dense, weights):
        weights[name] = without_domain_tokens(model.config, weights[name], index)
    load_exactly(dense, weights, buffers_of=model)
    return source.around(dense.train(model.training))


def expert_index(config: MoEConfigFields, expert: int | str, name: str = "expert") -> int:
    """The index of an expert that is given by index or domain, in an argument called ``name``.

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


def dense_state(
    model: MoEPreTrainedModel, expert: int, *, with_pairs: bool = True
) -> dict[str, Tensor]:
    """The weights of the dense model of an expert, with the mixture's vocabulary.

    Args:
        model: a mixture.
        expert: the expert's index.
        with_pairs: whether to add an expert's low-rank pairs to the weights that all share.
    """
    architecture, mlps = model.architecture, model.moe_mlps()
    prefix, dense_names = encoder_prefix(model), architecture.mlp_names
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.startswith(f"{prefix}{PREDICTOR}."):
            continue
        layer, inner = architecture.split(name.removeprefix(prefix)) or (-1, "")
        if layer not in mlps or not inner.startswith("mlp."):
            state[name] = value.clone()
        elif inner in dense_names:
            own = _weight_of(mlps[layer], inner.removeprefix("mlp."), value, expert, with_pairs)
            parts = own.chunk(len(dense_names[inner]))
            for old, part in zip(dense_names[inner], parts, strict=True):
                state[prefix + architecture.join(layer, old)] = part.clone()
    return state


def _weight_of(
    mlp: MoEMLP, name: str, value: Tensor, expert: int, with_pairs: bool = True
) -> Tensor:
    """An expert's parameter ``name`` from the mixture's: its own, shared, or adapted by a pair."""
    if mlp.is_expert(name):
        return value[expert]
    is_weight = not name.endswith("_bias")
    return (
        merged(value, mlp.pair(name), expert)
        if with_pairs and is_weight and mlp.has_pair(name)
        else value
    )


def merged(weight: Tensor, pair: LowRank, expert: int) -> Tensor:
    """An expert's weight of a shared one and a low-rank pair, computed in float64."""
    change = pair.b[expert].detach().double() @ pair.a[expert].detach().double()
    return (weight.double() + pair.scale * change).to(weight.dtype)


def _dense_config(model: MoEPreTrainedModel, keep_domain_tokens: bool) -> Any:
    config = config_settings(model.config)
    for field in fields(MoEConfigFields):
        config.pop(field.name, None)
    config.pop("auto_map", None)  # of a portable mixture
    if not keep_domain_tokens:
        config["vocab_size"] -= len(model.config.domain_token_ids)
    return model.architecture.dense_config.from_dict(config)


def without_domain_tokens(config: MoEConfigFields, rows: Tensor, expert: int) -> Tensor:
    """The rows of ordinary tokens; with enforced routing, the expert's token copied to [CLS]."""
    kept = rows[: rows.shape[0] - len(config.domain_token_ids)].clone()
    if config.routing == "enforced":
        assert config.domain_token_replaces is not None  # there are domain tokens
        kept[config.domain_token_replaces] = rows[config.domain_token_ids[expert]]
    return kept
