"""What a SentenceTransformer puts in front of every text."""

from __future__ import annotations

from typing import Any


def prompt_of(model: Any, prompt: str | None, *names: str | None) -> str:
    """The prompt given, or the first of the names that is one of the model's, or its default."""
    if prompt is not None:
        return prompt
    prompts = getattr(model, "prompts", None) or {}
    default = getattr(model, "default_prompt_name", None)
    return next((prompts[name] for name in (*names, default) if name in prompts), None) or ""
