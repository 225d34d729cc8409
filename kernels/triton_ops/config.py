"""Tile sizes: what a kernel is launched with, and whether it fits the GPU.

A configuration comes from the GPU's tuning table where it has one for the shape, else from a
heuristic. Nothing is searched here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from .numerics import INTERPRETED, SMALLEST_DOT

# Shared memory that one program may use, in bytes; sm_100 and gfx942 as Triton knows them.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# What parts we have no figure for can be trusted to have (sm_86, sm_89, sm_120).
_LEAST_SHARED_MEMORY = 101_376
KERNELS = ("up", "gated_up", "linear", "grad_hidden", "gated_grad_hidden", "grad_weight")
TABLES = Path(__file__).parent / "tuning"


@dataclass(frozen=True)
class Config:
    """Tile sizes of a grouped product [rows, n] = [rows, k] x [k, n].

    Attributes:
        block_m, block_n, block_k: the tile; powers of two, at least 16.
        num_warps, num_stages: Triton's: warps per program, depth of the load pipeline.
        group_m: row tiles that are walked together, for the cache.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < SMALLEST_DOT or size & (size - 1):
                raise ValueError(
                    f"{name} must be a power of two, at least {SMALLEST_DOT}; got {size}."
                )
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16; got {self.num_warps}.")
        for name in ("num_stages", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    def shared_memory(self, itemsize: int, products: int = 1) -> int:
        """Bytes that the pipelined operand tiles take; ``products``: B tiles beside one A tile."""
        columns = self.block_m + products * self.block_n
        return self.num_stages * self.block_k * columns * itemsize

    def meta(self) -> dict[str, int]:
        """As keyword arguments of a kernel launch."""
        return dict(
            BM=self.block_m,
            BN=self.block_n,
            BK=self.block_k,
            GROUP=self.group_m,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def fit(config: Config, itemsize: int, products: int, limit: int) -> Config:
    """``config`` made smaller until its operand tiles fit ``limit`` bytes of shared memory.

    First the pipeline gets shallower, down to two stages, then the tile thinner along k.
    """
    while config.shared_memory(itemsize, products) > limit:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > SMALLEST_DOT:
            config = replace(config, block_k=config.block_k // 2)
        else:
            raise ValueError(f"{config} needs more than the {limit} bytes of shared memory here.")
    return config


def heuristic(kernel: str, dtype: torch.dtype, target: str, n: int, k: int) -> Config:
    """The configuration for shapes that no table has.

    Args:
        kernel: one of ``KERNELS``.
        target: ``"sm_90"``, ``"gfx942"``, ... , or ``"interpreter"``.
        n, k: sizes of the product. Where they are no multiples of 16, rows are not aligned to
            what the GPU loads at once, and every element has an address of its own: small tiles.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}.")
    if target == "interpreter":  # pays per program and per operation, whatever their size
        return Config(32, 32, 32, num_warps=4, num_stages=1)
    products = 2 if kernel == "gated_up" else 1
    columns = 64 if kernel.startswith("gated") else 128
    if n % 16 or k % 16:
        rows, warps = (64, 4) if dtype.itemsize == 2 else (32, 8)
        config = Config(rows, 32, 32, num_warps=warps, num_stages=2)
    elif dtype == torch.float32:
        columns = 32 if kernel.endswith("grad_hidden") else columns // 2
        config = Config(64, columns, 32, num_warps=8, num_stages=3)
    elif target.startswith("gfx"):
        config = Config(128, columns, 32, num_warps=8, num_stages=2)
    else:
        config = Config(128, columns, 64, num_warps=8, num_stages=3)
    limit = SHARED_MEMORY.get(target, _LEAST_SHARED_MEMORY)
    return fit(config, dtype.itemsize, products, limit)


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


def config_for(kernel: str, like: Tensor, n: int, k: int, rows_per_expert: int) -> Config:
    """The table's configuration for a product of this size on ``like``'s GPU, or the heuristic's.

    ``rows_per_expert`` is the mean that shapes alone give, ``S / E``.
    """
    target = target_of(like.device.index)
    if target != "interpreter":
        name = torch.cuda.get_device_name(like.device)
        found = load_table(name).get(table_key(kernel, n, k, rows_per_expert, like.dtype))
        if found is not None:
            return found
    return heuristic(kernel, like.dtype, target, n, k)


# --- tuning tables -------------------------------------------------------------------------------


def table_key(kernel: str, n: int, k: int, rows_per_expert: int, dtype: torch.dtype) -> str:
    """The key of a shape: ``up/n3072/k768/rows8192/bfloat16``; rows rounded to a power of two."""
    bucket = triton.next_power_of_2(max(rows_per_expert, 1))
    return f"{kernel}/n{n}/k{k}/rows{bucket}/{str(dtype).removeprefix('torch.')}"


def table_path(gpu: str) -> Path:
    """Where the table of a GPU lies, by its name as CUDA gives it."""
    return TABLES / f"{gpu.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def load_table(gpu: str) -> Mapping[str, Config]:
    """The tuning table of a GPU; empty where none ships.

    Raises:
        ValueError: for a file that is not one: names the file, the entry and what is wrong.
    """
    path = table_path(gpu)
    return parse_table(path.read_text(), str(path)) if path.exists() else {}


def parse_table(text: str, source: str) -> dict[str, Config]:
    """The table in ``text``, JSON ``{"gpu": name, "configs": {key: {block_m: ..., ...}}}``."""
    try:
        entries = json.loads(text)["configs"]
        items = entries.items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{source} must be JSON with an object "configs": {error!r}.') from None
    table = {}
    for key, fields in items:
        try:
            table[key] = Config(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}, entry {key!r}: {error}") from None
    return table


def format_table(gpu: str, table: Mapping[str, Config]) -> str:
    """The JSON that :func:`parse_table` reads, entries in order of their keys."""
    configs = {key: asdict(table[key]) for key in sorted(table)}
    return json.dumps({"gpu": gpu, "configs": configs}, indent=1) + "\n"
