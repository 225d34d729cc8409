"""glibc's ``malloc_trim``, which gives memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def malloc_trim() -> Any:
    """Return glibc's function, which takes the bytes to keep; None where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
