"""Skips all but what needs no library where the extra ``eval`` is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

NEEDED = ("sklearn", "scipy", "ir_measures", "matplotlib")
if any(find_spec(name) is None for name in NEEDED):
    collect_ignore = [
        path.name for path in Path(__file__).parent.glob("test_*.py") if "usage" not in path.name
    ]
