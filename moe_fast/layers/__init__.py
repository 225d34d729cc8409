"""Modules: they hold parameters and no mathematics, which is :mod:`moe_fast.ops`'s."""

from moe_fast.layers.attention import ATTENTION
from moe_fast.layers.encoder_layers import (
    MoEBertLayer,
    MoEModernBertLayer,
    MoERobertaLayer,
    MoEXLMRobertaLayer,
)
from moe_fast.layers.moe_mlp import MoEMLP
from moe_fast.layers.router import MoERouter, RouterOutput
from moe_fast.layers.routing_info import RoutingInfo

__all__ = [
    "ATTENTION",
    "MoEBertLayer",
    "MoEMLP",
    "MoEModernBertLayer",
    "MoERobertaLayer",
    "MoERouter",
    "MoEXLMRobertaLayer",
    "RouterOutput",
    "RoutingInfo",
]
