"""The encoder of a SentenceTransformer, and copies of it with another encoder."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from moe_fast import compat
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.sentence_transformer import MoESentenceTransformer
from moe_fast.models.modeling import MoEModelMixin


def encoder_of(model: SentenceTransformer) -> Any:
    """The transformers encoder of ``model``.

    Raises:
        TypeError: it has several encoders, or none in its first module.
    """
    check_one_encoder(model)
    encoder = getattr(model[0], "model", None)
    if not isinstance(encoder, nn.Module) or encoder is not model.transformers_model:
        raise TypeError(
            f"model's first module must hold a transformers encoder; got {type(model[0]).__name__}."
        )
    return encoder


def with_encoder(model: SentenceTransformer, encoder: Any) -> SentenceTransformer:
    """A copy of ``model`` with ``encoder`` as its transformers encoder.

    Returns:
        A ``MoESentenceTransformer`` for a mixture, a stock ``SentenceTransformer`` for a dense
        encoder.
    """
    old = encoder_of(model)
    is_mixture = isinstance(encoder, MoEModelMixin)
    # The copy shares the old encoder, instead of copying it, until it is replaced.
    modules = OrderedDict(copy.deepcopy(compat.child_modules(model), {id(old): old}))
    first = next(iter(modules.values()))
    first.model = encoder
    compat.forwards_names(first, ("expert_ids", "domain", "domain_ids"))
    new: Any = (MoESentenceTransformer if is_mixture else SentenceTransformer)(
        modules=modules,
        device=str(model.device),
        prompts=copy.deepcopy(model.prompts),
        default_prompt_name=model.default_prompt_name,
    )
    kept = copy.deepcopy(model.module_kwargs or {})
    if is_mixture:
        new.module_kwargs = {**kept, **(new.module_kwargs or {})}
        new.truncate = getattr(model, "truncate", False)
        new.packed = getattr(model, "packed", True)
    else:  # a dense encoder has no domains
        new.module_kwargs = {n: [k for k in keys if k != "domain"] for n, keys in kept.items()}
    new.similarity_fn_name = model.similarity_fn_name
    new.truncate_dim = model.truncate_dim
    return new.train(model.training)


def settings_of(model: SentenceTransformer) -> dict[str, Any]:
    """All settings of a SentenceTransformer that affect its output, without the weights."""
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    settings = {name: getattr(model, name) for name in (*names, "max_seq_length")}
    for i, module in enumerate(model):
        settings[f"module {i}"] = type(module).__name__
        if hasattr(module, "get_config_dict"):
            config = module.get_config_dict()
            settings.update((f"module {i}'s {key}", value) for key, value in config.items())
    return settings
