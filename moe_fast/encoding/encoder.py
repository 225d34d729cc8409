"""The encoder of a SentenceTransformer, which must have exactly one."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def check_one_encoder(model: Any) -> None:
    """Raise for a model with several encoders, such as one for queries and one for documents.

    Its attributes give the encoder, tokenizer and length of the first encoder, so that the others
    would be ignored. Models that are no ``torch.nn.Module`` are not checked.

    Raises:
        TypeError: it has more than one encoder; the message names them.
    """
    encoders = _encoders(model)
    if len(encoders) > 1:
        raise TypeError(
            f"model must have one encoder; got a {type(model).__name__} of {len(encoders)}: "
            f"{', '.join(encoders)}. moe_fast takes no model with several encoders (Router, Asym); "
            "take one of them out, as a SentenceTransformer of its own."
        )


def _encoders(model: Any) -> list[str]:
    """Paths and classes of the transformers models in ``model``, but not those within others."""
    found: list[tuple[str, Any]] = []
    named_modules = getattr(model, "named_modules", None)
    for name, module in named_modules() if callable(named_modules) else ():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return [f"{type(module).__name__} at {name!r}" for name, module in found]
