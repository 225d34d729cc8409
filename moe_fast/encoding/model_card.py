"""The model card of a model of sentence-transformers with a mixture of experts.

It is that of sentence-transformers, with an example that runs and a section about the mixture.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moe_fast.files import write_text
from moe_fast.models.model_card import describe_mixture, describe_portable
from moe_fast.version import install_command

_HEADING = "\n## Mixture of experts\n"
_LOAD = """\
from sentence_transformers import {stock}

model = {stock}("path/to/this/folder", trust_remote_code=True)
vectors = model.encode(["a text"]{domain})"""
# Per thread, the domain for calls of ``encode`` that name none.
_domain: ContextVar[str | None] = ContextVar("moe_fast_card_domain", default=None)


@contextmanager
def domain_of_the_card(config: Any) -> Iterator[None]:
    """Within the block, sentence-transformers' example runs on a model that needs a domain."""
    token = _domain.set(_example_domain(config))
    try:
        yield
    finally:
        _domain.reset(token)


def use_domain(domain: Any) -> Any:
    """The domain given to ``encode``, else that of the card that is being written, if any."""
    return _domain.get() if domain is None else domain


def describe_use(encoder: Any, stock: str, card: Path) -> None:
    """Add to sentence-transformers' card how to load the mixture, and its settings."""
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    domain = _example_domain(encoder.config)
    text = _with_usage(text.split(_HEADING)[0].rstrip(), domain)
    text += "\n\n" + describe_mixture(
        encoder.config, encoder.num_parameters(), encoder.num_parameters(only_active=True)
    )
    example = _LOAD.format(stock=stock, domain="" if domain is None else f", domain={domain!r}")
    package = f"sentence-transformers=={version('sentence-transformers')}"
    write_text(card, text + describe_portable(encoder.config, example, package, extra="train"))


def _example_domain(config: Any) -> str | None:
    """The domain that the usage example names; ``None`` if it needs none."""
    if config.default_domain is None and config.routing == "enforced" and config.domains:
        return config.domains[0]
    return config.default_domain


def _with_usage(card: str, domain: str | None) -> str:
    """The card with sentence-transformers' usage example changed to run on a mixture."""
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
