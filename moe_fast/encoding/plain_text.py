"""Whether a sentence-transformers model needs nothing of a text but its tokens."""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer.modules import Transformer

from moe_fast import compat

_BY_TASK = ("query_length", "document_length", "query_expansion")


def why_not_plain(model: Any) -> str | None:
    """Return why texts cannot be tokenized once and handed over as padded batches, or ``None``."""
    first = model[0]
    if type(first) is not Transformer:
        return f"its first module is a {type(first).__name__}, not a Transformer"
    if first.modalities != ["text"]:
        return f"it takes {', '.join(first.modalities)}, not texts alone"
    if not compat.is_plain_call(model):
        return "it runs in other processes, or on batches of another form"
    if first.processing_kwargs or any(getattr(first, name, None) is not None for name in _BY_TASK):
        return "it has settings of its own for the tokenizer"
    if model.tokenizer.pad_token_id is None:
        return "its tokenizer has no padding token"
    return None
