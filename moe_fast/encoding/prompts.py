"""The prompt that a SentenceTransformer puts before every text."""

from __future__ import annotations

from typing import Any


def prompt_of(model: Any, prompt: str | None, *names: str | None) -> str:
    """``prompt``, else the model's prompt for the first known name, else its default prompt."""
    if prompt is not None:
        return prompt
    prompts = getattr(model, "prompts", None) or {}
    default = getattr(model, "default_prompt_name", None)
    return next((prompts[name] for name in (*names, default) if name in prompts), None) or ""
