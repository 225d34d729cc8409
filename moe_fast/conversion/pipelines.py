"""What conversions do with a ``SentenceTransformer``: convert its encoder, and keep all else."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from moe_fast import compat
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.sentence_transformer import MoESentenceTransformer
from moe_fast.models.extract import extract_expert
from moe_fast.models.join import check_same_tokenizers, join_encoders, mean_state
from moe_fast.models.upcycle import upcycle


def upcycle_sentence_transformer(
    model: SentenceTransformer, **settings: Any
) -> MoESentenceTransformer:
    """What :func:`moe_fast.upcycle` does with a ``SentenceTransformer``."""
    settings = _completed(model, settings)
    return _with_encoder(MoESentenceTransformer, model, upcycle(_encoder(model), **settings))


def join_sentence_transformers(
    models: Sequence[SentenceTransformer], *, shared: str, **settings: Any
) -> MoESentenceTransformer:
    """What :func:`moe_fast.from_experts` does with several ``SentenceTransformer``s.

    Modules behind the encoder that have weights (``Dense``) follow ``shared``.
    """
    first = models[0]
    encoders = [_encoder(model) for model in models]
    for i, model in enumerate(models[1:], 1):
        _check_same_pipeline(first, model, i)
    check_same_tokenizers([model.tokenizer for model in models])
    settings = _completed(first, settings)
    joined = _with_encoder(
        MoESentenceTransformer, first, join_encoders(encoders, shared=shared, **settings)
    )
    if shared == "mean":
        for name in list(compat.child_modules(first))[1:]:
            states = [model.get_submodule(name).state_dict() for model in models]
            joined.get_submodule(name).load_state_dict(mean_state(states))
    return joined


def _completed(model: SentenceTransformer, settings: dict[str, Any]) -> dict[str, Any]:
    """upcycle's settings, with what a ``SentenceTransformer`` knows or needs."""
    if settings["routing"] == "enforced" and not settings["domains"]:
        raise ValueError(
            "domains must be given with routing='enforced' for a SentenceTransformer, whose encode "
            "chooses the expert by domain; got none."
        )
    if settings.get("cls_token_id") is None and model.tokenizer is not None:
        settings = {**settings, "cls_token_id": model.tokenizer.cls_token_id}
    return settings


def _check_same_pipeline(first: SentenceTransformer, other: SentenceTransformer, i: int) -> None:
    """All but the weights must agree, or what differs would be dropped unseen."""
    want, have = _pipeline(first), _pipeline(other)
    differences = [
        f"{name}: {have.get(name)!r} instead of {want.get(name)!r}"
        for name in sorted({*want, *have})
        if want.get(name) != have.get(name)
    ]
    if differences:
        raise ValueError(
            f"models must differ in their weights alone; model {i} differs from model 0 in "
            f"{'; '.join(differences)}."
        )


def _pipeline(model: SentenceTransformer) -> dict[str, Any]:
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    settings = {name: getattr(model, name) for name in (*names, "max_seq_length")}
    for i, module in enumerate(model):
        settings[f"module {i}"] = type(module).__name__
        if hasattr(module, "get_config_dict"):
            config = module.get_config_dict()
            settings.update((f"module {i}'s {key}", value) for key, value in config.items())
    return settings


def with_mapped_encoder(
    model: SentenceTransformer, change: Callable[[Any], nn.Module]
) -> MoESentenceTransformer:
    """A copy of a mixture whose encoder is ``change`` of the old one."""
    new = _with_encoder(MoESentenceTransformer, model, change(_encoder(model)))
    new.truncate = getattr(model, "truncate", False)
    new.packed = getattr(model, "packed", True)
    return new


def extract_sentence_transformer(
    model: SentenceTransformer, expert: int | str, *, keep_domain_tokens: bool
) -> SentenceTransformer:
    """What :func:`moe_fast.extract_expert` does with a ``SentenceTransformer``."""
    dense = extract_expert(_encoder(model), expert, keep_domain_tokens=keep_domain_tokens)
    extracted = _with_encoder(SentenceTransformer, model, dense)
    extracted.module_kwargs = {
        name: [k for k in keys if k != "domain"]
        for name, keys in (model.module_kwargs or {}).items()
    }
    return extracted


def _encoder(model: SentenceTransformer) -> nn.Module:
    check_one_encoder(model)
    encoder = getattr(model[0], "model", None)
    if not isinstance(encoder, nn.Module) or encoder is not model.transformers_model:
        raise TypeError(
            f"model's first module must hold a transformers encoder; got {type(model[0]).__name__}."
        )
    return encoder


def _with_encoder(
    cls: type[SentenceTransformer], model: SentenceTransformer, encoder: nn.Module
) -> SentenceTransformer:
    """A copy of ``model`` as ``cls`` whose transformers encoder is ``encoder``."""
    old = _encoder(model)
    # The old encoder is shared into the copy, not copied, and then replaced.
    modules = OrderedDict(copy.deepcopy(compat.child_modules(model), {id(old): old}))
    first = next(iter(modules.values()))
    first.model = encoder
    compat.forwards_names(first, ("expert_ids", "domain", "domain_ids"))
    new = cls(
        modules=modules,
        device=str(model.device),
        prompts=copy.deepcopy(model.prompts),
        default_prompt_name=model.default_prompt_name,
    )
    new.module_kwargs = {**copy.deepcopy(model.module_kwargs or {}), **(new.module_kwargs or {})}
    new.similarity_fn_name = model.similarity_fn_name
    new.truncate_dim = model.truncate_dim
    return new.train(model.training)
