"""Loads the compiled half of moe_fast, if it was built, and calls its ops."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fast.version import build_command

# Tests name another library in the environment, such as a build with sanitizers.
_LIBRARY = Path(
    os.environ.get("MOE_FAST_NATIVE_LIBRARY")
    or Path(__file__).resolve().parent.parent / "_native.so"
)
# The GPU's kernels, if the build found nvcc. They need the first library's definitions.
_CUDA_LIBRARY = _LIBRARY.with_name("_native_cuda.so")
_OPS = (
    "plan",
    "route",
    "route_backward",
    "gather_rows",
    "combine_rows",
    "combine_rows_backward",
    "expert_mlp",
    "expert_mlp_backward",
    "expert_linear",
    "expert_linear_backward",
    "info_nce",
    "info_nce_backward",
    "int8_linear",
    "int8_expert_linear",
    "int8_expert_mlp",
    "varlen_attention",
    "add_norm",
    "attention_block",
    "cpu_capability",
    "int8_capability",
)


def _load() -> str | None:
    """Load the library; return why it does not load, or ``None``."""
    if not _LIBRARY.exists():
        if sys.platform == "win32":
            return "the native library is not built: it has no Windows build yet"
        return f"the native library is not built. To build it: {build_command()}"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return f"the native library does not load: {error}"
    if not all(hasattr(torch.ops.moe_fast_cpp, op) for op in _OPS):
        return f"the native library is older than this moe_fast. To build it: {build_command()}"
    return None


def _load_cuda() -> str | None:
    """Load the GPU's kernels, which needs no GPU; return why they do not load, or ``None``."""
    if _missing is not None:
        return _missing
    if not _CUDA_LIBRARY.exists():
        return "the native library was built without its CUDA half: CPU only"
    try:
        torch.ops.load_library(_CUDA_LIBRARY)
    except OSError as error:
        return f"the native library's CUDA half does not load: {error}"
    return None


def _describe() -> str:
    """Return how native ops compute on the CPU; ValueError if MOE_FAST_CPU asks for what is not."""
    if _missing is not None:
        return ""
    try:
        return torch.ops.moe_fast_cpp.cpu_capability()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


_missing = _load()
_missing_cuda = _load_cuda()
# How native ops multiply matrices on the CPU, and the instruction set that they use, for users to
# read; empty if they cannot.
cpu_capability = _describe()
# The instruction set by which native ops multiply 8-bit integers.
int8_capability: str = torch.ops.moe_fast_cpp.int8_capability() if _missing is None else ""


_warned = _missing is None or sys.platform == "win32"


def warn_once() -> None:
    """Warn, once per process, that ops run slowly because the library is missing.

    There is no warning on Windows, which has no build, or while ``torch.compile`` traces.
    """
    global _warned
    # A warning would break a graph that torch.compile is tracing.
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(f"moe_fast runs in its slow form, PyTorch alone: {_missing}", stacklevel=6)


def why_unavailable(device_type: str) -> str | None:
    """Return why native ops cannot run on ``device_type``; ``None`` if they can."""
    if device_type in ("cpu", "cuda"):
        return _missing if device_type == "cpu" else _missing_cuda
    return "the native library has kernels for cpu and cuda only"


def why_not_on_cpu(device_type: str) -> str | None:
    """Return why native ops that have only a CPU kernel cannot run there; ``None`` if they can."""
    return _missing if device_type == "cpu" else "the native library has a kernel for cpu only"


def why_no_products(device_type: str) -> str | None:
    """Return why native matrix products cannot run on ``device_type``; ``None`` if they can."""
    if device_type != "cpu":
        return "the native library multiplies matrices on the CPU only"
    if _missing is None and not cpu_capability:
        return "this torch exports neither oneDNN's block kernel nor a BLAS"
    return _missing


def call(op: Callable, *args: Any) -> Any:
    """Make the tensor arguments contiguous, then run the native op on them.

    Use :func:`call_on_views` for ops that accept strided tensors.
    """
    return call_on_views(op, *(t.contiguous() if isinstance(t, Tensor) else t for t in args))


def kernel(name: str) -> Callable:
    """Return a function that runs the native op of this name by :func:`call`."""

    def run(*args: Any) -> Any:
        return call(getattr(torch.ops.moe_fast_cpp, name), *args)

    return run


def call_on_views(op: Callable, *args: Any) -> Any:
    """Run a native op on tensors as they are.

    On the CPU, a ``RuntimeError`` of the op becomes a ``ValueError``, as the reference raises. On a
    GPU it stays a ``RuntimeError``: arguments were checked before, so the device is the cause.
    """
    try:
        return op(*args)
    except RuntimeError as error:
        if any(isinstance(t, Tensor) and t.is_cuda for t in args):
            raise
        raise ValueError(str(error)) from None
