"""The one encoder of a SentenceTransformer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def check_one_encoder(model: Any) -> None:
    """Refuse a model of several encoders, such as one for queries and one for documents.

    What asks for its encoder, tokenizer or length gets the first one's, so that the others would be
    passed over. Models that are no ``torch.nn.Module`` are left alone.

    Raises:
        TypeError: it has more than one; the message names them.
    """
    encoders = _encoders(model)
    if len(encoders) > 1:
        raise TypeError(
            f"model must have one encoder; got a {type(model).__name__} of {len(encoders)}: "
            f"{', '.join(encoders)}. moe_fast takes no model with several encoders (Router, Asym); "
            "take one of them out, as a SentenceTransformer of its own."
        )


def _encoders(model: Any) -> list[str]:
    """Places and classes of the transformers models in it, but those inside another one."""
    found: list[tuple[str, Any]] = []
    named_modules = getattr(model, "named_modules", None)
    for name, module in named_modules() if callable(named_modules) else ():
        inside = any(name.startswith(f"{outer}.") or outer == "" for outer, _ in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found.append((name, module))
    return [f"{type(module).__name__} at {name!r}" for name, module in found]
