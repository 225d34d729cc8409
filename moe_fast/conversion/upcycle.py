"""upcycle: makes a mixture of experts from a dense encoder, bare or with a head; same output.

Every expert starts as a copy of the dense MLP (Komatsuzaki et al., arXiv 2212.05055). So before
any training the mixture computes what the dense model does, if the weights of a token sum to 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_fast.architectures import encoder_prefix
from moe_fast.conversion.input_model import loaded
from moe_fast.conversion.multi_head import multi_head_weights
from moe_fast.conversion.trainable import set_trainable
from moe_fast.conversion.weights import config_settings, load_exactly, vocabulary_names
from moe_fast.models.lora import freeze_shared, has_lora
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.registry import architecture_of, build_moe, moe_model
from moe_fast.ops.checks import check_choice

ROUTER_INITS = ("normal", "kaiming_uniform")


def upcycle(
    model_or_path: Any,
    *,
    head: str | None = None,
    num_experts: int,
    num_experts_per_tok: int = 1,
    routing: str = "token_topk",
    weight_mode: str = "auto",
    layers: str | Sequence[int] = "all",
    target: str = "mlp",
    moe_block: str = "mlp",
    moe_heads: int | None = None,
    expert_form: str = "full",
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    domains: Sequence[str] | None = None,
    default_domain: str | None = None,
    domain_tokens: bool = True,
    cls_token_id: int | None = None,
    router_init: str = "normal",
    trainable: str | None = None,
    seed: int = 0,
) -> Any:
    """Make a mixture of experts from a dense encoder.

    Args:
        model_or_path: a ``BertModel``, ``RobertaModel``, ``ModernBertModel`` or another encoder of
            docs/encoders.md, or a model with a head of theirs, such as ``BertForMaskedLM``; a
            ``SentenceTransformer``, ``SparseEncoder`` or ``CrossEncoder`` with one of them; or the
            folder or hub id of any of them.
        head: from a folder or hub id without sentence-transformers' ``modules.json`` the encoder
            alone is read, as by ``AutoModel``; with "ForMaskedLM", "ForSequenceClassification" or
            "ForTokenClassification" also this head, as by ``AutoModelForMaskedLM`` and the others.
        num_experts, num_experts_per_tok: E, the number of experts, and K, how many of them each
            token uses.
        routing, weight_mode: as in :func:`moe_fast.ops.route`.
        layers: "all", "single" (the middle one, ``num_layers // 2``), "alternate" (every other
            one, from the second), or indices.
        target: "mlp", "intermediate" or "output", as in :class:`moe_fast.MoEMLP`.
        moe_block, moe_heads: "multi_head" puts a :class:`moe_fast.MoEMultiHeadMLP` of so many heads
            (by default 2) in the MLP's place. Its experts have other shapes than the MLP and start
            as small random weights: the mixture does *not* give the dense model's output before it
            is trained.
        expert_form, lora_rank, lora_alpha: "lora" gives experts that are low-rank pairs on one
            shared, frozen MLP, as in :class:`moe_fast.MoEMLP`; by default each expert has a full
            copy of the MLP.
        domains: names of the domains. With enforced routing (each text goes to the expert of its
            domain), one per expert.
        default_domain: the domain of batches that name none.
        domain_tokens: give each domain a token that replaces [CLS], with a copy of the embedding of
            [CLS]. The model places the token; the tokenizer is not changed. If you want to add
            tokens to the tokenizer, add them before upcycling: the domains get the next ids.
        cls_token_id: the id of [CLS]; needed if neither the model's configuration nor a tokenizer
            in its folder names it.
        router_init: "normal" (with the model's ``initializer_range``) or "kaiming_uniform" (as
            ``nn.Linear``).
        trainable: "all", "experts" or "experts+router": the parameters that keep
            ``requires_grad``. This is not saved; after loading the model again use
            :func:`moe_fast.models.set_trainable`. ``None``: "all", but of an encoder with LoRA
            experts only these and the routers, also after loading it again.
        seed: of the initialisation of routers and new experts; the global random state is not
            changed.

    Returns:
        A new model (``MoEBertModel``, ``MoEBertForMaskedLM`` ..., or a ``MoESentenceTransformer``
        for a ``SentenceTransformer`` and likewise ``MoESparseEncoder`` and ``MoECrossEncoder``) on
        the device and in the dtype of the input, which is not changed. Domain tokens are the last
        columns of a masked language model's logits; they start as a copy of [CLS]'s column.

    Raises:
        TypeError: for an unsupported architecture; the message lists the supported ones.
        ValueError: for settings that do not go together, naming the argument, and for a ``head``
            that the checkpoint lacks.
    """
    check_choice("router_init", router_init, ROUTER_INITS)
    if isinstance(domains, str):
        raise TypeError(f"domains must be a sequence of names; got the str {domains!r}.")
    source = loaded(model_or_path, head=head)
    source.check_domains(routing, domains)
    model = source.encoder
    architecture = architecture_of(model)
    if isinstance(model, MoEPreTrainedModel):
        raise TypeError(f"model must be dense; got {type(model).__name__}, a mixture already.")
    if cls_token_id is None and domains and domain_tokens:
        cls_token_id = getattr(source.tokenizer, "cls_token_id", None)
    fields = dict(
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        routing=routing,
        weight_mode=weight_mode,
        target=target,
        moe_block=moe_block,
        moe_heads=moe_heads,
        expert_form=expert_form,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        moe_layers=_layer_indices(layers, model.config.num_hidden_layers),
        domains=list(domains or []),
        default_domain=default_domain,
        upcycled_from=_public_name(model),
        **_domain_token_fields(model, domains or [], domain_tokens, cls_token_id),
    )
    config = moe_model(architecture).config_class.from_dict(config_settings(model.config) | fields)
    with torch.device("meta"):
        moe = build_moe(config, model)
    weights = _moe_state(model, moe)
    weights.update(_router_weights(moe, model, router_init, seed))
    weights.update(_lora_weights(moe, model, seed))
    weights.update(multi_head_weights(moe, model, seed))
    load_exactly(moe, weights, buffers_of=model)
    if trainable is None and has_lora(moe):
        freeze_shared(moe)
    else:
        set_trainable(moe, "all" if trainable is None else trainable)
    return source.around(moe.train(model.training))


def _public_name(model: PreTrainedModel) -> str:
    """The model's hub id or the name of its folder, without the path, which is private."""
    name = getattr(model, "name_or_path", "") or type(model).__name__
    if os.path.isabs(name) or os.path.exists(name) or name.startswith((".", "~")):
        return Path(name).resolve().name or type(model).__name__
    return name


def _layer_indices(layers: str | Sequence[int], num_layers: int) -> list[int]:
    if not isinstance(layers, str):
        return _checked_indices(layers, num_layers)
    check_choice("layers (or a list of indices)", layers, ("all", "single", "alternate"))
    if layers == "single":
        return [num_layers // 2]
    return list(range(1 if layers == "alternate" and num_layers > 1 else 0, num_layers))[
        :: 2 if layers == "alternate" else 1
    ]


def _checked_indices(layers: Any, num_layers: int) -> list[int]:
    indices = list(layers) if isinstance(layers, Iterable) else None
    fits = indices and all(isinstance(i, int) and 0 <= i < num_layers for i in indices)
    if not indices or not fits or len(set(indices)) != len(indices):
        raise ValueError(
            "layers must be 'all', 'single', 'alternate' or distinct indices in [0, num_layers) = "
            f"[0, {num_layers}), at least one; got {layers!r}."
        )
    return indices


def _domain_token_fields(
    model: PreTrainedModel, domains: Sequence[str], domain_tokens: bool, cls_token_id: int | None
) -> dict[str, Any]:
    """Configuration of the domain tokens, whose ids follow the vocabulary's last."""
    if not domains or not domain_tokens:
        return {}
    if cls_token_id is None:
        cls_token_id = getattr(model.config, "cls_token_id", None)
    if cls_token_id is None:
        cls_token_id = getattr(model.config, "bos_token_id", None)
    if cls_token_id is None:
        raise ValueError(
            "cls_token_id must be given: domain tokens take [CLS]'s place, and neither the "
            "model's configuration nor a tokenizer beside it says which id that is."
        )
    size = model.config.vocab_size
    if not 0 <= cls_token_id < size:
        raise ValueError(f"cls_token_id must lie in [0, vocab_size = {size}); got {cls_token_id}.")
    if cls_token_id == model.config.pad_token_id:
        raise ValueError(f"cls_token_id must not be the padding's id; got {cls_token_id}.")
    return {
        "domain_token_ids": list(range(size, size + len(domains))),
        "domain_token_replaces": cls_token_id,
        "vocab_size": size + len(domains),
    }


def _moe_state(model: PreTrainedModel, moe: MoEPreTrainedModel) -> dict[str, Tensor]:
    """The mixture's weights without the routers': the dense weights, copied to every expert."""
    architecture, prefix, dense = moe.architecture, encoder_prefix(moe), dict(model.state_dict())
    state = {}
    for layer, mlp in moe.moe_mlps().items():
        for new, names in architecture.mlp_names.items():
            places = [prefix + architecture.join(layer, name) for name in names]
            parts = [dense.pop(place, None) for place in places]
            if parts[0] is None or moe.config.moe_block != "mlp":
                continue  # no bias, or no place for the dense MLP
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            copies = [mlp.num_experts] if mlp.is_expert(new.removeprefix("mlp.")) else []
            copied = value.expand(*copies, *value.shape).clone()
            state[prefix + architecture.join(layer, new)] = copied
    state.update({name: value.clone() for name, value in dense.items()})
    for name in vocabulary_names(moe, state):  # rows of the domain tokens, behind all others
        cls_row = state[name][moe.config.domain_token_replaces]
        count = len(moe.config.domain_token_ids)
        state[name] = torch.cat((state[name], cls_row.expand(count, *cls_row.shape)))
    return state


def _router_weights(
    moe: MoEPreTrainedModel, model: PreTrainedModel, router_init: str, seed: int
) -> dict[str, Tensor]:
    """New router weights, drawn on the CPU so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in moe.named_parameters():
        if not name.endswith("mlp.router.weight"):
            continue
        value = torch.empty(parameter.shape, dtype=torch.float32)
        if router_init == "normal":
            nn.init.normal_(value, std=moe.config.initializer_range, generator=generator)
        else:
            nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
        weights[name] = value.to(device=model.device, dtype=model.dtype)
    return weights


def _lora_weights(moe: MoEPreTrainedModel, model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """New low-rank pairs, as PEFT draws them: A uniform, different for each expert, and B 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in moe.named_parameters():
        if not name.endswith(("proj_A", "proj_B")):
            continue
        value = torch.zeros(parameter.shape, dtype=torch.float32)
        if name.endswith("_A"):
            bound = 1 / math.sqrt(parameter.shape[-1])
            nn.init.uniform_(value, -bound, bound, generator=generator)
        weights[name] = value.to(device=model.device, dtype=model.dtype)
    return weights
