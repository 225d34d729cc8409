"""add_projection_head: a small MLP behind the pooling, as modules of sentence-transformers.

    e = W2 . tanh(W1 . LayerNorm(p) + b1) + b2          p: the pooled vector [D]

The modules are sentence-transformers' own ``LayerNorm`` and two ``Dense``, so that a saved folder
loads anywhere, and upcycling, extraction and joining keep them as they keep all modules.

Source: the pooler of Hallee et al., arXiv 2401.15713, in its ModernBERT form.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.compat import child_modules
from moe_fast.conversion.importing import read_weights
from moe_fast.extras import require
from moe_fast.ops.checks import check_count

_NAMES = ("layernorm.weight", "layernorm.bias", "w1.weight", "w1.bias", "w2.weight", "w2.bias")


def add_projection_head(
    model: Any,
    hidden_size: int | None = None,
    out_size: int | None = None,
    *,
    checkpoint: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Any:
    """A model with a projection head behind its pooling, before a module that normalises.

    Args:
        model: a ``SentenceTransformer``, dense or a mixture.
        hidden_size, out_size: of the two linear maps; by default the size of the pooled vector, or
            what the checkpoint has.
        checkpoint: weights to take the head from, by Hallee et al.'s names, which may have a
            prefix: ``pooler.layernorm.weight``, ``pooler.w1.weight``, ``pooler.w2.weight`` and
            biases (an absent bias counts as 0). As :func:`moe_fast.import_checkpoint` takes it.
            ``None``: the head is new, and the model must be trained before use.
        seed: of a new head; the global random state is not changed.

    Returns:
        A new model of the same class; ``model`` is not changed.

    Raises:
        TypeError: the model is no ``SentenceTransformer``.
        ValueError: it has no pooling, the checkpoint lacks the head, has weights of it that are
            not known or do not fit together, or sizes are given that differ from its sizes.
    """
    library = require("sentence_transformers", "train", "add_projection_head")
    if not isinstance(model, library.SentenceTransformer):
        raise TypeError(f"model must be a SentenceTransformer; got {type(model).__name__}.")
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Pooling

    from moe_fast.conversion.pipelines import encoder_of, with_encoder

    modules: list[Any] = list(child_modules(model).values())
    places = [i for i, module in enumerate(modules) if isinstance(module, Pooling)]
    if not places:
        kinds = ", ".join(type(module).__name__ for module in modules)
        raise ValueError(f"model must have a Pooling, behind which the head goes; it has {kinds}.")
    size = modules[places[-1]].get_embedding_dimension()
    given = None if checkpoint is None else _head_of(checkpoint, size)
    hidden_size = _size("hidden_size", hidden_size, size, given, "w1.weight")
    out_size = _size("out_size", out_size, size, given, "w2.weight")
    head = [
        LayerNorm(size),
        Dense(size, hidden_size, activation_function=nn.Tanh()),
        Dense(hidden_size, out_size, activation_function=nn.Identity()),
    ]
    _fill(head, given, seed)
    encoder = encoder_of(model)
    new = with_encoder(model, copy.deepcopy(encoder))
    for i, module in enumerate(head):
        new.insert(places[-1] + 1 + i, module.to(device=encoder.device, dtype=encoder.dtype))
    return new.train(model.training)


def _head_of(checkpoint: Any, size: int) -> dict[str, Tensor]:
    """The head's weights by their own names, checked against each other and the pooled vector."""
    state = checkpoint if isinstance(checkpoint, Mapping) else read_weights(Path(checkpoint))
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        prefix, _, own = name.rpartition("pooler.")
        if "pooler." not in name or not own.startswith(("layernorm.", "w1.", "w2.")):
            continue
        if own not in _NAMES or own in found:
            raise ValueError(f"checkpoint must have {', '.join(_NAMES)} once; got {name}.")
        found[own] = value
    lacking = [n for n in _NAMES if n.endswith("weight") and n not in found]
    if lacking:
        raise ValueError(
            "checkpoint must have a projection head (pooler.layernorm, pooler.w1, pooler.w2); it "
            f"lacks {', '.join('pooler.' + name for name in lacking)}."
        )
    hidden, out = (found[name].shape[0] for name in ("w1.weight", "w2.weight"))
    sizes = ([size], [size], [hidden, size], [hidden], [out, hidden], [out])
    shapes = dict(zip(_NAMES, sizes, strict=True))
    for name in _NAMES:
        if name not in found:
            found[name] = torch.zeros(shapes[name], dtype=found["w1.weight"].dtype)
        if list(found[name].shape) != shapes[name]:
            raise ValueError(
                f"checkpoint's pooler.{name} must have shape {shapes[name]}, for a pooled vector "
                f"of {size}; got {list(found[name].shape)}."
            )
    return found


def _size(name: str, value: int | None, default: int, given: Any, weight: str) -> int:
    stored = None if given is None else given[weight].shape[0]
    if value is None:
        return default if stored is None else stored
    check_count(name, value)
    if stored not in (None, value):
        raise ValueError(f"{name} must be the checkpoint's, {stored}; got {value}.")
    return value


def _fill(head: list[Any], given: dict[str, Tensor] | None, seed: int) -> None:
    norm, first, second = head
    layers = {"layernorm": norm.norm, "w1": first.linear, "w2": second.linear}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, layer in layers.items():
            for part, parameter in layer.named_parameters():
                if given is not None:
                    parameter.copy_(given[f"{name}.{part}"])
                elif name != "layernorm":
                    bound = layer.in_features**-0.5  # as nn.Linear
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)
