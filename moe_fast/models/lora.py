"""Mixtures whose experts are low-rank pairs on one shared MLP (LoRA): what of them is trained."""

from __future__ import annotations

from typing import Any


def has_lora(model: Any) -> bool:
    """Whether a model is a mixture with LoRA experts."""
    return getattr(getattr(model, "config", None), "expert_form", "full") == "lora"


def freeze_shared(model: Any) -> None:
    """Freeze an encoder but for its experts' pairs and its routers; a head stays as it is."""
    model.base_model.requires_grad_(False)
    for mlp in model.moe_mlps().values():
        mlp.router.requires_grad_(True)
        for _, parameter in mlp.expert_parameters():
            parameter.requires_grad_(True)


def check_full(model: Any, what: str) -> None:
    """Raise ``ValueError`` unless experts are full MLPs, for otherwise it cannot be ``what``."""
    if getattr(getattr(model, "config", None), "moe_block", "mlp") != "mlp":
        raise ValueError(
            f"a mixture with multi-head blocks cannot be {what}: its experts see parts of tokens."
        )
    if has_lora(model):
        raise ValueError(
            f"a mixture with LoRA experts cannot be {what}. moe_fast.merge_lora makes one of it "
            "whose experts have weights of their own, and which gives the same output."
        )
