"""Portable folders: saved mixtures with the code that loads them where moe_fast is not installed.

The code is one file that needs PyTorch and transformers alone. None of it is written a second time:
layers, routing and the reference operations are copied from this package's sources, and what they
need of the rest stands in :mod:`moe_fast.models.portable_template`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from moe_fast import compat
from moe_fast.architectures import Architecture
from moe_fast.models.source_bundle import SourceBundle
from moe_fast.version import __version__

_TEMPLATE = "moe_fast.models.portable_template"
_FILE = '''\
# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts made of {dense}, in PyTorch and transformers alone.

Copied by moe_fast {version} from its own sources, whose names stand above the parts. This is the
file that ``trust_remote_code=True`` runs where moe_fast is not installed.
"""

from __future__ import annotations

{sources}


define(
    Architecture(
{entry}
    )
)
'''


def code_file(config: Any) -> str:
    """The name of the file of code beside a mixture's configuration."""
    return f"modeling_{config.model_type}.py"


def is_portable(config: Any) -> bool:
    """Whether a mixture's configuration is saved with the code beside it."""
    return getattr(config, "auto_map", None) == auto_map(config)


def auto_map(config: Any) -> dict[str, str]:
    """How ``config.json`` names the classes in that file; of a configuration or of its class."""
    stem = f"{code_file(config).removesuffix('.py')}.MoE{_architecture(config).name}"
    return {"AutoConfig": f"{stem}Config", "AutoModel": f"{stem}Model"}


def _architecture(config: Any) -> Architecture:
    # Of the class, for a configuration may have a field of that name.
    return (config if isinstance(config, type) else type(config)).architecture


def set_portable(model: PreTrainedModel, portable: bool | None) -> None:
    """Have a mixture saved with its code, or without it, from now on; ``None``: as before.

    A model with a head that was loaded from the folder of a portable encoder is not portable.

    Raises:
        ValueError: for what a portable file cannot do: heads, adapters, encoders of other
            libraries. Nothing is changed then.
    """
    if portable:
        _check(model)
        model.config.auto_map = auto_map(model.config)
    elif (portable is False or model.base_model is not model) and is_portable(model.config):
        del model.config.auto_map


def _check(model: PreTrainedModel) -> None:
    parts = _architecture(model.config)
    classes = (parts.dense_model, parts.dense_layer, parts.dense_config)
    foreign = [c for c in classes if not c.__module__.startswith("transformers.")]
    why = None
    if compat.saves_adapter_alone(model):
        why = "this model is saved as an adapter alone (merge it first)"
    elif model.base_model is not model:
        why = f"the file is of bare encoders, without a head; got {type(model).__name__}"
    elif model.config.quantization is not None:
        why = "the file computes in floating numbers, and this mixture is quantised"
    elif model.config.moe_block != "mlp":
        why = "the file has no multi-head blocks"
    elif model.config.expert_form != "full":
        why = "its experts are LoRA pairs (moe_fast.merge_lora gives them weights of their own)"
    elif foreign:
        why = f"the file takes transformers' encoders alone; got {foreign[0].__module__}"
    elif parts.forward is not None and not parts.forward.__module__.startswith("moe_fast."):
        why = f"the file takes moe_fast's own forwards alone; got {parts.forward.__module__}"
    if why is not None:
        raise ValueError(f"portable must be False: {why}.")


def portable_code(architecture: Architecture) -> str:
    """The file's text; its classes have moe_fast's names, ``MoEBertConfig`` and so on."""
    bundle = SourceBundle(stand_in=_TEMPLATE)
    bundle.add(_TEMPLATE, "define")
    entry = []
    for field in fields(architecture):
        value = getattr(architecture, field.name)
        if isinstance(value, type):
            bundle.add_import(value.__module__, value.__name__)
        elif callable(value):
            bundle.add(value.__module__, value.__name__)
        text = value.__name__ if callable(value) else repr(value)
        entry.append(f"        {field.name}={text},")
    return _FILE.format(
        dense=architecture.dense_model.__name__,
        version=__version__,
        sources=bundle.text(),
        entry="\n".join(entry),
    )
