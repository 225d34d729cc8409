"""What may be saved as a whole model, and which files of an earlier one it replaces."""

from __future__ import annotations

from transformers import PreTrainedModel

from moe_fast import compat
from moe_fast.models.portable import code_file


def replaced_files(model: PreTrainedModel, variant: str | None = None) -> tuple[str, ...]:
    """Patterns of an earlier save's files of weights and code, which must not outlive a new one.

    There are none for a model with an adapter, which is saved alone, beside whatever is there.
    """
    if compat.saves_adapter_alone(model):
        return ()
    part = "" if variant is None else f".{variant}"
    return (
        f"model{part}.safetensors",
        f"model{part}-?????-of-?????.safetensors",
        f"model.safetensors.index{part}.json",
        code_file(model.config),
    )


def check_no_adapter(model: PreTrainedModel) -> None:
    """Raise ``ValueError`` for a model with PEFT adapters, whose weights are not all its own."""
    if any(hasattr(module, "get_base_layer") for module in model.modules()):
        raise ValueError(
            "model must have no PEFT adapters in it: merge them first, with "
            "PeftModel.merge_and_unload(), or save them alone, with PeftModel.save_pretrained()."
        )
