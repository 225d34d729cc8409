"""The compiled half of moe_fast, loaded where the build made it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The environment names another one for tests, such as a build with sanitizers.
_LIBRARY = Path(
    os.environ.get("MOE_FAST_NATIVE_LIBRARY")
    or Path(__file__).resolve().parent.parent / "_native.so"
)
_OPS = (
    "plan",
    "expert_mlp",
    "expert_mlp_backward",
    "expert_linear",
    "expert_linear_backward",
    "cpu_capability",
)


def _load() -> str | None:
    """Load the library; the reason why not, or ``None``."""
    if not _LIBRARY.exists():
        return "the native library is not built (MOE_FAST_NATIVE=1 pip install says why)"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    if not all(hasattr(torch.ops.moe_fast_cpp, op) for op in _OPS):
        return "the native library is older than this moe_fast: install again"
    return None


_missing = _load()
# What native ops compute with on the CPU, for people; empty where they cannot multiply matrices.
cpu_capability: str = torch.ops.moe_fast_cpp.cpu_capability() if _missing is None else ""


def why_unavailable(device_type: str) -> str | None:
    """Why native ops cannot run on ``device_type``; ``None`` if they can."""
    if _missing is None and device_type != "cpu":
        return "the native library has CPU kernels only in this version"
    return _missing


def why_no_products(device_type: str) -> str | None:
    """Why native ops that multiply matrices cannot run on ``device_type``; ``None`` if they can."""
    reason = why_unavailable(device_type)
    if reason is None and not cpu_capability:
        return "this torch exports neither oneDNN's block kernel nor a BLAS"
    return reason


def call(op: Callable, *args: Any) -> Any:
    """Run a native op; what it refuses is a ``ValueError``, as in the reference."""
    try:
        return op(*(t.contiguous() if isinstance(t, Tensor) else t for t in args))
    except RuntimeError as error:  # what a native op can raise
        raise ValueError(str(error)) from None
