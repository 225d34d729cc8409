"""The sources of the losses in BibTeX, which sentence-transformers puts on a model's card."""

from __future__ import annotations

from pathlib import Path

_ENTRIES = Path(__file__).with_name("citations.bib").read_text(encoding="utf-8").split("\n\n")


def citation_of(key: str) -> str:
    """The entry of this key."""
    return next(entry for entry in _ENTRIES if f"{{{key},\n" in entry)
