"""add_expert and remove_expert: make a mixture with one more expert, or one fewer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fast.architectures import encoder_prefix
from moe_fast.conversion.extract import expert_index
from moe_fast.conversion.input_model import given, mixture_of
from moe_fast.conversion.weights import load_exactly, mean_of, vocabulary_names
from moe_fast.models.domain_predictor import NAME as PREDICTOR
from moe_fast.models.domain_predictor import predicted_domains
from moe_fast.models.lora import has_lora
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.registry import build_moe


def add_expert(
    model: Any, domain: str | None = None, *, from_expert: int | str | None = None
) -> Any:
    """Make a mixture with one more expert, which is the last.

    With enforced routing (each text goes to the expert of its domain) the outputs of the old
    domains stay the same, bit for bit, and the new domain gives the output of ``from_expert``. A
    learned router gets a copy of the row of ``from_expert``. With K = 1 and weight 1 (modes
    "straight_through" and "one") outputs stay the same too, until training changes the row, because
    the lower id is chosen if logits are equal. In the other modes no row could keep the outputs:
    there the new expert takes a share of the tokens of ``from_expert``. A domain predictor does not
    know the new domain: ``domain="auto"`` is an error until it is fitted again.

    Args:
        model: a mixture, or a ``MoESentenceTransformer``.
        domain: the new domain's name. It must be given if the model has enforced routing and
            domains, and only then. If the model has domain tokens, the new one is a copy of that
            of ``from_expert`` and follows the vocabulary's last.
        from_expert: the expert to copy, an index or (enforced routing) a domain's name. ``None``:
            the mean of all experts (also of their router rows and domain tokens); LoRA experts have
            no mean of their rank, and one must be named.

    Returns:
        A new model of the same class; ``model`` is not changed.

    Raises:
        TypeError: for a model that is no mixture.
        ValueError: for a domain that exists already, is missing or would not be used, and for an
            unknown ``from_expert``.
    """
    source = given(model)
    mixture = mixture_of(source)
    config = mixture.config
    if from_expert is None and has_lora(mixture):
        raise ValueError(
            "from_expert must name an expert to copy: the mean of LoRA experts is not of their "
            "rank; got None."
        )
    everyone = [[expert] for expert in range(config.num_experts)]
    copied = (
        list(range(config.num_experts))
        if from_expert is None
        else [expert_index(config, from_expert, "from_expert")]
    )
    _check_new_domain(config, domain)
    domains = [*config.domains, *([] if domain is None else [domain])]
    return source.around(_regroup(mixture, [*everyone, copied], domains))


def remove_expert(model: Any, expert: int | str) -> Any:
    """Make a mixture without one of the experts, and with enforced routing without its domain.

    The indices of the later experts decrease by one. ``remove_expert(add_expert(model, ...), E)``
    equals ``model``, bit for bit. A domain predictor goes on without the removed domain.

    Args:
        model: a mixture, or a ``MoESentenceTransformer``.
        expert: its index, or (enforced routing) its domain's name.

    Returns:
        A new model of the same class; ``model`` is not changed.

    Raises:
        TypeError: for a model that is no mixture.
        ValueError: for an unknown expert, for the expert of ``default_domain``, and if fewer than
            K experts would remain.
    """
    source = given(model)
    mixture = mixture_of(source)
    config = mixture.config
    index = expert_index(config, expert)
    needed = 1 if config.routing == "dense" else config.num_experts_per_tok
    if config.num_experts <= needed:
        raise ValueError(
            f"expert cannot be removed: {config.num_experts - 1} experts would remain, and "
            f"num_experts_per_tok={needed} are needed."
        )
    domains = list(config.domains)
    if config.routing == "enforced" and domains:
        gone = domains.pop(index)
        if gone == config.default_domain:
            raise ValueError(
                f"expert {expert!r} is the one of default_domain={gone!r}: set "
                "model.config.default_domain to another domain, or None, first."
            )
    kept = [[e] for e in range(config.num_experts) if e != index]
    return source.around(_regroup(mixture, kept, domains))


def _check_new_domain(config: Any, domain: str | None) -> None:
    needs_one = config.routing == "enforced" and bool(config.domains)
    if domain is None:
        if needs_one:
            raise ValueError(
                "domain must name the new expert's domain: the model routes by domain "
                f"({', '.join(config.domains)}); got None."
            )
        return
    if not needs_one:
        why = (
            "the model has no domains, its experts go by index"
            if config.routing == "enforced"
            else f"with routing={config.routing!r} a domain has no expert of its own"
        )
        raise ValueError(f"domain must be None: {why}; got {domain!r}.")
    if domain in config.domains:
        raise ValueError(
            f"domain must be a new name; the model has {', '.join(config.domains)}; got {domain!r}."
        )


def _regroup(
    model: MoEPreTrainedModel, groups: Sequence[Sequence[int]], domains: list[str]
) -> MoEPreTrainedModel:
    """A model whose expert i is the mean of the experts ``groups[i]`` of ``model``."""
    architecture, prefix = model.architecture, encoder_prefix(model)
    mlps = model.moe_mlps()
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        layer, inner = architecture.split(name.removeprefix(prefix)) or (-1, "")
        stacked = (
            layer in mlps
            and inner.startswith("mlp.")
            and (inner == "mlp.router.weight" or mlps[layer].is_expert(inner.removeprefix("mlp.")))
        )
        weights[name] = _gather(value, groups) if stacked else value.clone()
    config = _regrouped_config(model.config, groups, domains)
    before, after = predicted_domains(model.config), predicted_domains(config)
    for name in [f"{prefix}{PREDICTOR}.{part}" for part in ("weight", "bias") if before]:
        scores = weights.pop(name)  # a column for each domain
        if after:
            weights[name] = scores[..., [before.index(domain) for domain in after]]
    with torch.device("meta"):
        new = build_moe(config, model)
    for name in vocabulary_names(new, weights):  # each expert's domain has a token
        first = model.config.domain_token_ids[0]
        words, own = weights[name][:first], weights[name][first:]
        weights[name] = torch.cat((words, _gather(own, groups)))
    load_exactly(new, weights, buffers_of=model)
    for name, parameter in model.named_parameters():
        new.get_parameter(name).requires_grad_(parameter.requires_grad)
    return new.train(model.training)


def _gather(stacked: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    return torch.stack([mean_of([stacked[e] for e in group]) for group in groups])


def _regrouped_config(config: Any, groups: Sequence[Sequence[int]], domains: list[str]) -> Any:
    new = copy.deepcopy(config)
    new.num_experts = len(groups)
    if new.routing == "dense":
        new.num_experts_per_tok = len(groups)
    if config.domain_token_ids:
        first = config.domain_token_ids[0]
        new.domain_token_ids = list(range(first, first + len(domains)))
        new.vocab_size = first + len(domains)
    new.domains = domains
    if (fitted := new.domain_predictor) is not None:
        known = [name for name in fitted["domains"] if name in domains]
        if known != fitted["domains"]:
            fitted.pop("accuracy", None)  # measured with the domain that went
            new.domain_predictor = {**fitted, "domains": known} if known else None
    new.check()
    return new
