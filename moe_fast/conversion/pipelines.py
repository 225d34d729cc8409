"""The encoder of a model of sentence-transformers, and copies of it with another encoder."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn

from moe_fast import compat
from moe_fast.encoding.cross_encoder import MoECrossEncoder
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.sentence_transformer import MoESentenceTransformer
from moe_fast.encoding.sparse_encoder import MoESparseEncoder
from moe_fast.encoding.three_head_encoder import (
    MoEThreeHeadEncoder,
    ThreeHeadEncoder,
    ThreeHeadPipeline,
)
from moe_fast.models.pretrained import MoEPreTrainedModel

# The stock classes and, of the same, those on a mixture.
_CLASSES: dict[type[Any], type[Any]] = {
    ThreeHeadEncoder: MoEThreeHeadEncoder,
    SentenceTransformer: MoESentenceTransformer,
    SparseEncoder: MoESparseEncoder,
    CrossEncoder: MoECrossEncoder,
}
# What may be set after a model is made; each class has some of them.
_SETTINGS = ("similarity_fn_name", "truncate_dim", "max_active_dims", "activation_fn")


def encoder_of(model: Any) -> Any:
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


def with_encoder(model: Any, encoder: Any) -> Any:
    """A copy of ``model`` with ``encoder`` as its transformers encoder.

    Args:
        model: a ``SentenceTransformer``, ``SparseEncoder`` or ``CrossEncoder``, stock or ours, or
            an encoder with three heads.
        encoder: of the same kind as its own: a mixture or a dense model, with the same head.

    Returns:
        Our class (``MoESentenceTransformer`` ...) for a mixture, the stock one for a dense encoder.
    """
    old = encoder_of(model)
    is_mixture = isinstance(encoder, MoEPreTrainedModel)
    # The copy shares the old encoder, instead of copying it, until it is replaced.
    modules = OrderedDict(copy.deepcopy(compat.child_modules(model), {id(old): old}))
    first = next(iter(modules.values()))
    first.model = encoder
    compat.forwards_names(first, ("expert_ids", "domain", "domain_ids"))
    for module in modules.values():
        if isinstance(module, SpladePooling) and module.embedding_dimension is not None:
            module.embedding_dimension = encoder.config.vocab_size  # domain tokens among them
    stock = _stock_class(model)
    new: Any = (_CLASSES[stock] if is_mixture else stock)(
        modules=modules,
        device=str(model.device),
        prompts=copy.deepcopy(model.prompts),
        default_prompt_name=model.default_prompt_name,
    )
    kept = copy.deepcopy(model.module_kwargs or {})
    if is_mixture:
        new.module_kwargs = {**kept, **(new.module_kwargs or {})}
        if isinstance(new, MoESentenceTransformer):
            new.truncate = getattr(model, "truncate", False)
            new.packed = getattr(model, "packed", True)
    else:  # a dense encoder has no domains
        new.module_kwargs = {n: [k for k in keys if k != "domain"] for n, keys in kept.items()}
    for name in _SETTINGS:
        if hasattr(model, name):
            setattr(new, name, getattr(model, name))
    if isinstance(model, ThreeHeadPipeline):
        new.head_file_dtypes = dict(model.head_file_dtypes)
    if getattr(model, "keep_in_fp32_modules", None):
        new.set_keep_in_fp32_modules(model.keep_in_fp32_modules)
    return new.train(model.training)


def _stock_class(model: Any) -> type[Any]:
    if isinstance(model, ThreeHeadPipeline):
        return ThreeHeadEncoder
    for stock in _CLASSES:
        if isinstance(model, stock):
            return stock
    raise TypeError(
        f"model must be a {', a '.join(stock.__name__ for stock in _CLASSES)} or an encoder; got "
        f"{type(model).__name__}."
    )


def settings_of(model: Any) -> dict[str, Any]:
    """All settings of a model of sentence-transformers that affect its output, not the weights."""
    names = ("prompts", "default_prompt_name", *_SETTINGS[:-1], "max_seq_length")
    settings = {name: getattr(model, name) for name in names if hasattr(model, name)}
    settings["class"] = _stock_class(model).__name__
    settings["activation_fn"] = repr(getattr(model, "activation_fn", None))
    for i, module in enumerate(model):
        settings[f"module {i}"] = type(module).__name__
        if hasattr(module, "get_config_dict"):
            config = module.get_config_dict()
            settings.update((f"module {i}'s {key}", value) for key, value in config.items())
    return settings
