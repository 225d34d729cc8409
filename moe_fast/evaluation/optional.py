"""Libraries that only the evaluation needs."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import a library of the extra ``eval``.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise ImportError(
            f"this evaluation needs {package}, which is not installed: pip install 'moe-fast[eval]'"
        ) from error
