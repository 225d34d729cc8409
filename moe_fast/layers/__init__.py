"""Modules that hold parameters and call the operations of :mod:`moe_fast.ops`."""

from typing import Any

from moe_fast.architectures import ARCHITECTURES
from moe_fast.layers import encoder_layers
from moe_fast.layers.attention import ATTENTION
from moe_fast.layers.moe_mlp import MoEMLP
from moe_fast.layers.multi_head import MoEMultiHeadMLP
from moe_fast.layers.router import MoERouter, RouterOutput
from moe_fast.layers.routing_info import RoutingInfo

__all__ = [
    "ATTENTION",
    "MoEMLP",
    "MoEMultiHeadMLP",
    "MoERouter",
    "RouterOutput",
    "RoutingInfo",
    *(f"MoE{architecture.name}Layer" for architecture in ARCHITECTURES),
]


def __getattr__(name: str) -> Any:
    """``MoEBertLayer`` and the other layers, which are made from the table of architectures."""
    if name.startswith("MoE"):
        return getattr(encoder_layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
