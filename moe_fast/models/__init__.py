"""Configurations and models that transformers' AutoConfig and AutoModel load."""

from typing import Any

from moe_fast.architectures import ARCHITECTURES
from moe_fast.models import configuration, modeling
from moe_fast.models.modeling import MoEModelOutput, MoEModelOutputWithPooling
from moe_fast.models.registry import register_architecture

__all__ = [
    "MoEModelOutput",
    "MoEModelOutputWithPooling",
    *(f"MoE{architecture.name}Config" for architecture in ARCHITECTURES),
    *(f"MoE{architecture.name}Model" for architecture in ARCHITECTURES),
    "register_architecture",
]


def __getattr__(name: str) -> Any:
    """``MoEBertConfig``, ``MoEBertModel`` and all others that are made from the table."""
    if name.startswith("MoE"):
        return getattr(configuration if name.endswith("Config") else modeling, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
