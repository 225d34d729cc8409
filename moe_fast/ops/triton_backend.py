"""Says where Triton's kernels can run, and runs them on the GPU of their tensors.

The kernels (``kernels/triton_ops``) are imported at the first call, so that ``import moe_fast``
needs neither Triton nor a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_fast.ops import backends
from moe_fast.ops.checks import COMPILED_DTYPES, FLOAT_DTYPES

_INSTALLED = importlib.util.find_spec("triton") is not None
# Read in the way in which Triton reads it when the kernels are imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
_OLDEST = (8, 0)  # bfloat16 and asynchronous copies


def why_unavailable(device_type: str) -> str | None:
    """Return why Triton's kernels cannot run on ``device_type``; ``None`` if they can.

    With ``TRITON_INTERPRET=1`` they run on the CPU, slowly. This is for tests, and "auto" never
    chooses it.
    """
    if not _INSTALLED:
        return "triton is not installed"
    if device_type == "cpu":
        return None if _INTERPRETED else "Triton kernels run on GPUs (tests: TRITON_INTERPRET=1)"
    if device_type != "cuda":  # ROCm calls itself cuda too
        return f"Triton kernels are written for CUDA and ROCm, not for {device_type}"
    if _INTERPRETED:
        return "TRITON_INTERPRET is set: kernels are interpreted, on the CPU only"
    return _gpu_missing()


@torch.compiler.assume_constant_result
def _gpu_missing() -> str | None:
    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


@torch.compiler.assume_constant_result
def why_unsuitable(index: int | None) -> str | None:
    """Return why Triton's kernels cannot run on a GPU, given by its index; ``None`` if they can."""
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) >= _OLDEST:
        return None
    return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"


def offer(op: str, run: Callable) -> None:
    """Register ``run`` as the triton backend of ``op``.

    On a GPU the reference computes float64, which serves for comparisons only, and no kernel is
    compiled for it. The interpreter runs it, so that tests can compare the kernels' arithmetic to
    1e-10.
    """
    dtypes = FLOAT_DTYPES if _INTERPRETED else COMPILED_DTYPES
    backends.register(op, "triton", run, why_unavailable, dtypes=dtypes, unsuitable=why_unsuitable)


def on_device(kernels: Callable) -> Callable:
    """Decorate ``kernels`` to launch on the GPU of the first tensor, even if another is current."""

    @functools.wraps(kernels)
    def run(first: Tensor, *args: Any) -> Any:
        if first.device.type != "cuda":
            return kernels(first, *args)
        with torch.cuda.device(first.device):
            return kernels(first, *args)

    return run
