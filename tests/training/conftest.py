"""Makes ``tiny_models`` importable, and skips all where the training extra is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

NEEDED = ("sentence_transformers", "datasets", "accelerate")
if any(find_spec(name) is None for name in NEEDED):
    collect_ignore_glob = ["test_*.py"]
