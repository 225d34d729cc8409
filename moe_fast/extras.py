"""Imports libraries that only an extra installs, where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from moe_fast.version import install_command

# Packages whose names differ from their modules'.
_PACKAGES = {"Bio": "biopython", "faiss": "faiss-cpu", "sklearn": "scikit-learn"}


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import and return ``module``.

    Args:
        module: such as ``"scipy.stats"``.
        extra: the extra of moe_fast that installs it.
        purpose: what needs it; the message begins with this.

    Raises:
        ImportError: it cannot be imported; the message says how to install the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(module, extra, purpose, error) from error


def missing(module: str, extra: str, purpose: str, error: ImportError | None = None) -> ImportError:
    """Make the error that says which library ``purpose`` lacks, and how to install it."""
    name = module.partition(".")[0]
    package = _PACKAGES.get(name, name.replace("_", "-"))
    why = "is not installed"
    if error is not None and (error.name or name).partition(".")[0] != name:
        why = f"cannot be imported ({error})"  # it is installed, but lacks another module
    return ImportError(f"{purpose} needs {package}, which {why}: {install_command(extra)}")
