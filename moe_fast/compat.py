"""What moe_fast needs of other libraries beyond what they promise, in one place.

Every name here may change or go with any release of its library. Each function or constant says
what it is for, and what happens without it: a fallback, or a clear error when it is used. Nothing
here keeps ``import moe_fast`` from working.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# --- transformers and peft -----------------------------------------------------------------------


@contextmanager
def adapter_methods() -> Iterator[None]:
    """Around transformers' own methods for adapters: say what works where they refuse peft.

    A release of transformers may refuse the newest peft there is (5.24 wants 0.22, and 0.21.2 is
    the last). Its error is quoted; peft's own functions do not go through transformers.

    Raises:
        ValueError: transformers refused the version of peft that is installed.
    """
    try:
        yield
    except (ValueError, ImportError) as error:
        reason = str(error)
        if "peft" not in reason.lower() or "version" not in reason.lower():
            raise
        installed = {name: _version(name) for name in ("transformers", "peft")}
        if installed["peft"] is None:
            raise
        raise ValueError(
            f"transformers {installed['transformers']} refuses peft {installed['peft']} in its own "
            f"methods for adapters ({reason}). Use peft's functions, which work with both: "
            "peft.get_peft_model(model, config), for a saved adapter "
            "peft.PeftModel.from_pretrained(model, folder); in a SentenceTransformer: "
            "model[0].model = peft.get_peft_model(model[0].model, config). Or install a peft that "
            "this transformers accepts, or an earlier transformers."
        ) from error


def saves_adapter_alone(model: Any) -> bool:
    """Whether transformers' ``save_pretrained`` writes an adapter instead of the whole model.

    So it does once its own ``add_adapter`` or ``load_adapter`` has run, which a private flag says.

    Raises:
        RuntimeError: the flag is gone, and the model has adapters: what would be written is open.
    """
    alone = getattr(model, "_hf_peft_config_loaded", None)
    if alone is None and any(hasattr(module, "get_base_layer") for module in model.modules()):
        raise RuntimeError(
            f"transformers {_version('transformers')} no longer says whether a model with an "
            "adapter is saved whole or as the adapter alone. Merge the adapter first "
            "(PeftModel.merge_and_unload), or install an earlier transformers."
        )
    return bool(alone)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
