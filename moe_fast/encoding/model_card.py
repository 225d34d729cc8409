"""The model card of a pipeline on a mixture: sentence-transformers' own, made to run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from moe_fast.files import atomic_write
from moe_fast.models.model_card import describe_mixture
from moe_fast.version import install_command

_HEADING = "\n## Mixture of experts\n"
# The domain of calls of ``encode`` that name none, within a thread.
_domain: ContextVar[str | None] = ContextVar("moe_fast_card_domain", default=None)


@contextmanager
def domain_of_the_card(config: Any) -> Iterator[None]:
    """Let sentence-transformers run its usage example on a model that needs a domain."""
    token = _domain.set(_example_domain(config))
    try:
        yield
    finally:
        _domain.reset(token)


def use_domain(domain: Any) -> Any:
    """The domain given to ``encode``; where none is, that of the card being written, if any."""
    return _domain.get() if domain is None else domain


def describe_use(encoder: Any, card: Path) -> None:
    """Complete the card that sentence-transformers wrote: how to load, and what the mixture is."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    text = _with_usage(text.split(_HEADING)[0].rstrip(), _example_domain(encoder.config))
    text += "\n\n" + describe_mixture(
        encoder.config, encoder.num_parameters(), encoder.num_parameters(only_active=True)
    )
    with atomic_write(card) as partial:
        partial.write_text(text, encoding="utf-8")


def _example_domain(config: Any) -> str | None:
    """The domain that the usage example names; ``None`` where it needs none."""
    if config.default_domain is None and config.routing == "enforced" and config.domains:
        return config.domains[0]
    return config.default_domain


def _with_usage(card: str, domain: str | None) -> str:
    """sentence-transformers' usage example, made to run on a mixture."""
    load = "from sentence_transformers import SentenceTransformer\n"
    register = f"import moe_fast  # registers the architecture: {install_command('train')}\n"
    if register not in card:
        card = card.replace(load, register + load, 1)
    for stock in ("SparseEncoder", "CrossEncoder"):  # ours takes a domain wherever it is needed
        load = f"from sentence_transformers import {stock}\n"
        ours = f"from moe_fast import MoE{stock}  # {install_command('train')}\n"
        card = card.replace(load, ours, 1).replace(f"model = {stock}(", f"model = MoE{stock}(", 1)
    if domain is None:
        return card
    call = r"(model\.(?:encode\w*|predict)\(\w+)\)"
    card = re.sub(call, lambda match: f"{match[1]}, domain={domain!r})", card)
    rank = re.compile(r"(model\.rank\(\n.*?\n    \])\n\)", re.DOTALL)
    return rank.sub(lambda match: f"{match[1]},\n    domain={domain!r},\n)", card)
