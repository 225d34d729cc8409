"""The losses' mathematics as plain functions of tensors."""

from moe_fast.ops import info_nce

__all__ = ["info_nce"]
