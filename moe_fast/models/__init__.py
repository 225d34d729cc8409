"""Configurations and models that transformers' AutoConfig and AutoModel load."""

from typing import Any

from moe_fast.architectures import ARCHITECTURES
from moe_fast.models import configuration, heads, modeling
from moe_fast.models.domain_predictor import DomainPredictor
from moe_fast.models.heads import (
    MoEMaskedLMOutput,
    MoESequenceClassifierOutput,
    MoETokenClassifierOutput,
)
from moe_fast.models.modeling import MoEModelOutput, MoEModelOutputWithPooling
from moe_fast.models.registry import register_architecture

__all__ = [
    "DomainPredictor",
    "MoEMaskedLMOutput",
    "MoEModelOutput",
    "MoEModelOutputWithPooling",
    "MoESequenceClassifierOutput",
    "MoETokenClassifierOutput",
    *(f"MoE{a.name}{part}" for a in ARCHITECTURES for part in ("Config", "Model", *a.heads)),
    "register_architecture",
]


def __getattr__(name: str) -> Any:
    """``MoEBertConfig``, ``MoEBertForMaskedLM`` and all others that are made from the table."""
    message = f"module {__name__!r} has no attribute {name!r}"
    if name.startswith("MoE"):
        for home in (configuration, modeling, heads):
            if name in vars(home):
                return vars(home)[name]
        there = [f"MoE{a.name}{h}" for a in ARCHITECTURES for h in a.heads]
        message += _of_the_same_encoder(name, there)
    raise AttributeError(message)


def _of_the_same_encoder(name: str, there: list[str]) -> str:
    """The heads that there are, for somebody who asks for another one."""
    stem, is_head, _ = name.partition("For")
    others = [other for other in there if other.partition("For")[0] == stem]
    return f"; mixtures with a head: {', '.join(others)}" if is_head and others else ""
