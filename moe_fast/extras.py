"""Libraries that only an extra brings: imported where they are used, asked for by name."""

from __future__ import annotations

import importlib
from types import ModuleType

from moe_fast.version import install_command

# Packages whose name is not their module's.
_PACKAGES = {"faiss": "faiss-cpu", "sklearn": "scikit-learn"}


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import ``module``.

    Args:
        module: such as ``"scipy.stats"``.
        extra: the extra of moe_fast that brings it.
        purpose: what needs it, to begin the message with.

    Raises:
        ImportError: it cannot be imported; the message says how to install the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(module, extra, purpose, error) from error


def missing(module: str, extra: str, purpose: str, error: ImportError | None = None) -> ImportError:
    """The error that says what ``purpose`` lacks, and how to install it."""
    name = module.partition(".")[0]
    package = _PACKAGES.get(name, name.replace("_", "-"))
    why = "is not installed"
    if error is not None and (error.name or name).partition(".")[0] != name:
        why = f"cannot be imported ({error})"  # it is there, and lacks something itself
    return ImportError(f"{purpose} needs {package}, which {why}: {install_command(extra)}")
