"""Makes the training tests' ``tiny_models`` importable."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "training"))
