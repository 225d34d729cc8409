"""Descriptions of dense encoders, from which the classes of their mixtures are made."""

from moe_fast.architectures.architecture import Architecture, make_class, setting
from moe_fast.architectures.table import ARCHITECTURES

__all__ = ["ARCHITECTURES", "Architecture", "make_class", "setting"]
