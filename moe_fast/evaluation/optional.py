"""Imports optional libraries that only the evaluation needs."""

from __future__ import annotations

from types import ModuleType

from moe_fast import extras


def require(module: str) -> ModuleType:
    """Import a library of the extra ``eval``.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    return extras.require(module, "eval", "this evaluation")
