"""Descriptions of dense encoders, from which the classes of their mixtures are made."""

from moe_fast.architectures.architecture import (
    HEADS,
    Architecture,
    encoder_prefix,
    make_class,
    setting,
)
from moe_fast.architectures.table import ARCHITECTURES

__all__ = ["ARCHITECTURES", "HEADS", "Architecture", "encoder_prefix", "make_class", "setting"]
