"""Makes ``tiny_models`` importable, and skips all where the training extra is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

NEEDED = ("sentence_transformers", "datasets", "accelerate")
if any(find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _no_model_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's card takes several times as long as its training here."""
    from sentence_transformers import SentenceTransformer

    from moe_fast import MoESentenceTransformer

    for model in (SentenceTransformer, MoESentenceTransformer):
        monkeypatch.setattr(model, "_create_model_card", lambda *_, **__: None)
