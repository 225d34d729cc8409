"""Changes how a pipeline makes one vector of a text's token vectors."""

from __future__ import annotations

from typing import Any

from moe_fast import compat
from moe_fast.ops.checks import check_choice

POOLINGS = ("cls", "mean", "last")
_THEIR_NAMES = {"cls": "cls", "mean": "mean", "last": "lasttoken"}


def set_pooling(model: Any, pooling: str) -> None:
    """Set the pooling of a model, in place.

    Args:
        model: a ``SentenceTransformer``, dense or a mixture, that has one Pooling module.
        pooling: "cls" (the first token's vector, with domain tokens that of the domain), "mean"
            (over the real tokens) or "last" (the last real token's).

    Raises:
        ValueError: the pooling is unknown, or modules behind the pooling need another width.
        TypeError: the model does not have one Pooling module.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    check_choice("pooling", pooling, POOLINGS)
    places = {
        name: module
        for name, module in compat.child_modules(model).items()
        if isinstance(module, Pooling)
    }
    if len(places) != 1:
        raise TypeError(
            f"pooling={pooling!r}: the model must have one Pooling module; it has {len(places)}."
        )
    ((name, old),) = places.items()
    token_dim = old.get_config_dict()["embedding_dimension"]
    if old.get_embedding_dimension() != token_dim:  # several poolings side by side
        raise ValueError(
            f"pooling={pooling!r} would make vectors of {token_dim} numbers, where the model's "
            f"pooling, {old.get_config_dict()['pooling_mode']}, makes "
            f"{old.get_embedding_dimension()}."
        )
    setattr(model, name, Pooling(token_dim, _THEIR_NAMES[pooling], old.include_prompt))
