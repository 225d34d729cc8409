"""Files in, datasets out."""

from __future__ import annotations

from moe_fast.data.pairs import read_pairs

__all__ = ["read_pairs"]
