"""from_experts: makes several dense encoders the experts of one mixture.

It is the inverse of :func:`moe_fast.extract_expert`. Models that were fine-tuned separately, one
per domain, from the same pretrained model are joined without training (Sukhbaatar et al.,
Branch-Train-MiX, arXiv 2403.07816).
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_fast.architectures import encoder_prefix
from moe_fast.compat import child_modules
from moe_fast.conversion.input_model import Given, loaded
from moe_fast.conversion.upcycle import upcycle
from moe_fast.conversion.weights import mean_of, vocabulary_names
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.registry import architecture_of
from moe_fast.ops.checks import check_choice

SHARED = ("first", "mean")

# Models may differ in these settings, which affect outputs in training at most.
_BOOKKEEPING = {
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "initializer_range",
    "initializer_cutoff_factor",
    "gradient_checkpointing",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
}


def from_experts(
    models: Sequence[Any],
    *,
    domains: Sequence[str] | None = None,
    shared: str = "first",
    routing: str = "enforced",
    **upcycle_kwargs: Any,
) -> Any:
    """Join N dense encoders into a mixture whose expert e has the MLPs of model e.

    Args:
        models: N encoders of one architecture, head, size, dtype and tokenizer, as
            :func:`moe_fast.upcycle` takes them: models, SentenceTransformers, folders, hub ids.
            Either all are SentenceTransformers or none is. Bare models in memory have no tokenizer
            to compare: make sure that they use the same.
        domains: names of the domains; with enforced routing (each text goes to the expert of its
            domain) one per model. A domain token, which replaces [CLS], then starts as the [CLS]
            of its own model, otherwise as that of the shared weights.
        shared: the source of all other weights, including the MLPs of layers without experts and
            the projection that ``target`` leaves out: "first", the first model, or "mean",
            the mean over the models. Dropout rates come from the first.
        routing: "enforced", or a learned mode, whose router starts as in :func:`moe_fast.upcycle`.
        **upcycle_kwargs: any other argument of :func:`moe_fast.upcycle`, except ``num_experts``.

    Returns:
        A new mixture on the device of the first model; the inputs are not changed. If the models
        differ in their MLPs alone, expert e computes exactly what model e did.

    Raises:
        TypeError: for models of different kinds, and for unknown arguments.
        ValueError: for models that differ in more than weights; the message says how.
    """
    _check_arguments(models, shared, upcycle_kwargs)
    if upcycle_kwargs.get("moe_block", "mlp") != "mlp":
        raise ValueError(
            "moe_block must be 'mlp': the experts of from_experts are whole MLPs; got "
            f"{upcycle_kwargs['moe_block']!r}."
        )
    if upcycle_kwargs.get("expert_form", "full") != "full":
        raise ValueError(
            "expert_form must be 'full': the experts of from_experts are whole MLPs. "
            "moe_fast.from_adapters joins LoRA adapters of one model."
        )
    head = upcycle_kwargs.pop("head", None)
    sources = [loaded(model, f"models[{i}]", head=head) for i, model in enumerate(models)]
    _check_one_kind(sources)
    check_same_tokenizers([source.tokenizer for source in sources])
    sources[0].check_domains(routing, domains)
    if upcycle_kwargs.get("cls_token_id") is None:
        known = [s.tokenizer.cls_token_id for s in sources if s.tokenizer is not None]
        upcycle_kwargs["cls_token_id"] = known[0] if known else None
    settings = {"domains": domains, "routing": routing, **upcycle_kwargs}
    encoders = [source.encoder for source in sources]
    joined = sources[0].around(_join_encoders(encoders, shared=shared, **settings))
    if shared == "mean" and sources[0].pipeline is not None:
        _average_modules(joined, [source.pipeline for source in sources])
    return joined


def _check_one_kind(sources: Sequence[Given]) -> None:
    """Check that all are bare, or all are SentenceTransformers with the same settings."""
    bare = [source.pipeline is None for source in sources]
    if all(bare):
        return
    if any(bare):
        kinds = ", ".join(
            type(s.encoder if s.pipeline is None else s.pipeline).__name__ for s in sources
        )
        raise TypeError(f"models must all be encoders or all SentenceTransformers; got {kinds}.")
    from moe_fast.conversion.pipelines import settings_of

    want = settings_of(sources[0].pipeline)
    for i, source in enumerate(sources):
        _refuse(i, _setting_differences(want, settings_of(source.pipeline)))


def _average_modules(joined: Any, pipelines: Sequence[Any]) -> None:
    """Set the weights of the modules after the encoder (such as ``Dense``) to their mean."""
    for name in list(child_modules(joined))[1:]:
        states = [pipeline.get_submodule(name).state_dict() for pipeline in pipelines]
        joined.get_submodule(name).load_state_dict(_mean_state(states))


def _check_arguments(models: Any, shared: str, upcycle_kwargs: dict[str, Any]) -> None:
    if isinstance(models, (str, os.PathLike)) or not isinstance(models, Sequence) or not models:
        raise TypeError(f"models must be a sequence of models or paths, at least one; got {models}")
    check_choice("shared", shared, SHARED)
    allowed = set(inspect.signature(upcycle).parameters) - {"model_or_path", "num_experts"}
    unknown = sorted(upcycle_kwargs.keys() - allowed)
    if unknown:
        hint = " (the number of experts is that of the models)" if "num_experts" in unknown else ""
        raise TypeError(
            f"from_experts takes upcycle's {', '.join(sorted(allowed))}; got "
            f"{', '.join(unknown)}{hint}."
        )


def _join_encoders(
    encoders: Sequence[PreTrainedModel], *, shared: str, **settings: Any
) -> MoEPreTrainedModel:
    """:func:`from_experts` for bare encoders whose tokenizers have been compared."""
    _check_same_models(encoders)
    base, states = encoders[0], [encoder.state_dict() for encoder in encoders]
    if shared == "mean":
        base = copy.deepcopy(base)
        base.load_state_dict(_mean_state(states))
    moe = upcycle(base, num_experts=len(encoders), **settings)
    architecture, prefix = moe.architecture, encoder_prefix(moe)
    with torch.no_grad():
        for layer, mlp in moe.moe_mlps().items():
            for name, parameter in mlp.expert_parameters():
                dense_names = architecture.mlp_names[f"mlp.{name}"]
                sources = [prefix + architecture.join(layer, old) for old in dense_names]
                for expert, state in enumerate(states):
                    parameter[expert] = torch.cat([state[source] for source in sources])
        if moe.config.domain_token_ids and moe.config.routing == "enforced":
            for name in vocabulary_names(moe, states[0]):
                rows = moe.get_parameter(name)
                for token, state in zip(moe.config.domain_token_ids, states, strict=True):
                    rows[token] = state[name][moe.config.domain_token_replaces]
    return moe


def _mean_state(states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of several state dicts with the same names, tensor by tensor."""
    return {name: mean_of([state[name] for state in states]) for name in states[0]}


def _check_same_models(encoders: Sequence[PreTrainedModel]) -> None:
    first = encoders[0]
    for i, model in enumerate(encoders):
        architecture_of(model)
        if isinstance(model, MoEPreTrainedModel):
            raise TypeError(
                f"models must be dense; model {i} is a {type(model).__name__}, a mixture already. "
                "Take one of its experts with extract_expert."
            )
        differences = (
            [f"class: {type(model).__name__} instead of {type(first).__name__}"]
            if type(model) is not type(first)
            else _setting_differences(_settings(first), _settings(model))
            + _weight_differences(first, model)
        )
        _refuse(i, differences)


def _refuse(i: int, differences: list[str]) -> None:
    if differences:
        raise ValueError(
            f"models must differ in their weights alone; model {i} differs from model 0 in "
            f"{'; '.join(differences)}."
        )


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    return {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in _BOOKKEEPING and not name.startswith("_") and "dropout" not in name
    }


def _setting_differences(want: dict[str, Any], have: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {have.get(name)!r} instead of {want.get(name)!r}"
        for name in sorted({*want, *have})
        if want.get(name) != have.get(name)
    ]


def _weight_differences(first: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    want, have = first.state_dict(), other.state_dict()
    names = sorted(want.keys() ^ have.keys())
    differences = [
        f"{name}: {'missing' if name in want else 'not in model 0'}" for name in names[:5]
    ]
    for name in want.keys() & have.keys():
        a, b = want[name], have[name]
        if a.shape != b.shape:
            differences.append(f"{name}: shape {list(b.shape)} instead of {list(a.shape)}")
        elif a.dtype != b.dtype:
            return [*differences, f"dtype: {b.dtype} instead of {a.dtype}"]
    return differences


def check_same_tokenizers(tokenizers: Sequence[Any]) -> None:
    """Raise ``ValueError`` unless all tokenizers (``None``: not known) make the same ids."""
    known = [(i, tokenizer) for i, tokenizer in enumerate(tokenizers) if tokenizer is not None]
    for i, tokenizer in known[1:]:
        j, first = known[0]
        for what, of in (("vocabulary", _vocabulary), ("rules", _rules)):
            if of(tokenizer) != of(first):
                raise ValueError(
                    f"models must share one tokenizer; the {what} of model {i}'s differs from "
                    f"that of model {j}'s."
                )


def _vocabulary(tokenizer: Any) -> Any:
    return tokenizer.get_vocab(), tokenizer.all_special_tokens, tokenizer.cls_token_id


def _rules(tokenizer: Any) -> Any:
    """The rules by which a tokenizer splits text, without the settings of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer)
    rules = json.loads(backend.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}
