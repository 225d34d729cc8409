"""Makes ``toy_encoder``, ``loss_checks`` and the training tests' ``tiny_models`` importable."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "training")]
