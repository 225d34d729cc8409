"""The losses' sources in BibTeX, which sentence-transformers prints on model cards."""

from __future__ import annotations

from pathlib import Path

_ENTRIES = Path(__file__).with_name("citations.bib").read_text(encoding="utf-8").split("\n\n")


def citation_of(key: str) -> str:
    """Return the BibTeX entry with this key; ``StopIteration`` if there is none."""
    return next(entry for entry in _ENTRIES if f"{{{key},\n" in entry)
