"""The configuration that a product is launched with: the tuning table's, else the heuristic's.

``tune.py`` searches for configurations; this file does not.
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from .config import DATA_CENTRE, Config, heuristic, why_not
from .numerics import INTERPRETED
from .tuning_tables import load_table, table_key


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


def gpu_name(device: torch.device) -> str:
    """The name of a GPU in the file name of its tuning table."""
    return "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)


@functools.cache
def multiprocessors(device_index: int | None) -> int:
    """How many programs that fill a multiprocessor run at a time; a few in the interpreter."""
    if INTERPRETED:
        return 3
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def math_of(like: Tensor) -> str:
    """How activations are computed for results like ``like``: one of ``numerics.MATHS``."""
    return "exact" if like.dtype.itemsize > 2 else exp2_of(like)


def exp2_of(like: Tensor) -> str:
    """How ``numerics.exp2`` is computed on ``like``'s device, for results of any dtype."""
    return "approximate" if target_of(like.device.index).startswith("sm_") else "short"


def pads_experts(like: Tensor, num_rows: int, num_experts: int) -> bool:
    """Whether the rows of a mixture are sorted and padded once (``padded_plan.py``).

    It costs a copy and up to 127 rows per expert, and gains where products of many rows then run
    without indices and masks. Elsewhere rows are gathered by each product.
    """
    target = target_of(like.device.index)
    return target in DATA_CENTRE and like.dtype.itemsize == 2 and num_rows >= 1024 * num_experts


def config_for(
    kernel: str, like: Tensor, n: int, k: int, rows_per_expert: int, gathered: bool = False
) -> Config:
    """The table's configuration for a product of this size on ``like``'s GPU, or the heuristic's.

    Args:
        kernel: one of ``KERNELS``.
        like: a tensor of the product's dtype, on its device.
        rows_per_expert: the mean, ``S // E``, which follows from shapes alone.
        gathered: as in :func:`.config.why_not`.

    Raises:
        ValueError: a table entry cannot run on this GPU; the message says why.
    """
    gpu, key = gpu_name(like.device), table_key(kernel, n, k, rows_per_expert, like.dtype)
    found, target = load_table(gpu).get(key), target_of(like.device.index)
    if found is None:
        return heuristic(kernel, like.dtype, target, n, k, rows_per_expert)
    reason = why_not(found, kernel, like.dtype, target, n, k, gathered)
    if reason is not None:
        raise ValueError(f"the tuning table of {gpu}, entry {key!r}: {reason}.")
    return found
