"""Which configuration a product is launched with: the tuning table's, else the heuristic's.

Nothing is searched here; see ``tune.py``.
"""

from __future__ import annotations

import functools
import sys

import torch
import triton
from torch import Tensor

from .config import LEAST_SHARED_MEMORY, SHARED_MEMORY, Config, heuristic, products_of
from .numerics import INTERPRETED
from .tables import load_table, table_key


@functools.cache
def target_of(device_index: int | None) -> str:
    """``"sm_90"``, ``"gfx942"``, ... of a GPU; ``"interpreter"`` where no GPU is used."""
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return str(target.arch)
    major, minor = torch.cuda.get_device_capability(device_index)
    return f"sm_{major}{minor}"


def limit_of(device: torch.device) -> int:
    """Bytes of shared memory that one program may use on ``device``."""
    target = target_of(device.index)
    # The interpreter has no such limit.
    return (
        sys.maxsize if target == "interpreter" else SHARED_MEMORY.get(target, LEAST_SHARED_MEMORY)
    )


def gpu_name(device: torch.device) -> str:
    """The name that a GPU's tuning table goes by."""
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)


def config_for(kernel: str, like: Tensor, n: int, k: int, rows_per_expert: int) -> Config:
    """The table's configuration for a product of this size on ``like``'s GPU, or the heuristic's.

    Args:
        kernel: one of ``KERNELS``.
        like: a tensor of the product's dtype, on its device.
        rows_per_expert: the mean that shapes alone give, ``S // E``.

    Raises:
        ValueError: for a table's entry that needs more shared memory than there is.
    """
    gpu, key = gpu_name(like.device), table_key(kernel, n, k, rows_per_expert, like.dtype)
    found = load_table(gpu).get(key)
    if found is None:
        return heuristic(kernel, like.dtype, target_of(like.device.index), n, k)
    needed, limit = (
        found.shared_memory(like.dtype.itemsize, products_of(kernel)),
        limit_of(like.device),
    )
    if needed > limit:
        raise ValueError(
            f"the tuning table of {gpu}, entry {key!r}, needs {needed} bytes of shared memory; "
            f"this GPU has {limit}."
        )
    return found
