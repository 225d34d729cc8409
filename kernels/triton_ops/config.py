"""Configurations of products: implementation and tile sizes, GPU limits, and a heuristic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .numerics import SMALLEST_DOT

# Shared memory that one program may use, in bytes; for sm_100 and gfx942 the limits of Triton.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "gfx942": 65_536,
}
# The least of the other GPUs (sm_86, sm_89, sm_120).
LEAST_SHARED_MEMORY = 101_376
# "linear_transposed" reads weights in the other layout: rows instead of columns are contiguous.
KERNELS = (
    "up",
    "gated_up",
    "linear",
    "linear_transposed",
    "grad_hidden",
    "gated_grad_hidden",
    "grad_weight",
)
# With fewer rows per expert than this, half of a 128-row tile would be empty.
_FEW_ROWS = 64
# Ours is the first. Only our kernels compute products that have an epilogue of their own.
IMPLEMENTATIONS = ("triton", "grouped_mm")
BY_GROUPED_MM = ("linear", "linear_transposed", "grad_weight")
# Products whose operands can be loaded by tensor descriptors, and the GPUs that support these.
BY_DESCRIPTORS = ("up", "gated_up", "linear", "linear_transposed")
DATA_CENTRE = ("sm_90", "sm_100", "sm_103")
_WITH_TMA = (*DATA_CENTRE, "interpreter")


@dataclass(frozen=True)
class Config:
    """How a grouped product [rows, n] = [rows, k] x [k, n] is computed.

    Attributes:
        descriptors: load operand tiles by tensor descriptors instead of by pointers; gathered rows
            are copied first.
        implementation: one of ``IMPLEMENTATIONS``; "grouped_mm" ignores the other settings.
        block_m, block_n, block_k: the tile; powers of two, at least 16.
        num_warps, num_stages: Triton's warps per program and depth of the load pipeline.
        group_m: row tiles that are processed together, so that they share cached columns.
        parts: the parts of its columns in which the epilogue of "up" and "grad_hidden" finishes a
            tile, one after the other; a power of two.
        maxnreg: the most registers per thread, 0 for no limit. With 128, two programs of 8 warps
            run on a multiprocessor at a time, and one multiplies while the other finishes a tile.
        persistent: one program per multiprocessor, with specialised warps, computes tile after
            tile (``persistent_linear.py``). It needs padded rows; without, the heuristic's
            configuration is used.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    num_warps: int = 8
    num_stages: int = 3
    group_m: int = 8
    descriptors: bool = False
    implementation: str = "triton"
    parts: int = 2
    maxnreg: int = 0
    persistent: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < SMALLEST_DOT or size & (size - 1):
                raise ValueError(
                    f"{name} must be a power of two, at least {SMALLEST_DOT}; got {size}."
                )
        for name in ("descriptors", "persistent"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; got {getattr(self, name)!r}.")
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; "
                f"got {self.implementation!r}."
            )
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16; got {self.num_warps}.")
        for name in ("num_stages", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.parts not in (1, 2, 4, 8):
            raise ValueError(f"parts must be 1, 2, 4 or 8; got {self.parts}.")
        if self.maxnreg and not 32 <= self.maxnreg <= 255:
            raise ValueError(f"maxnreg must be 0 or from 32 to 255; got {self.maxnreg}.")

    def shared_memory(self, itemsize: int, products: int = 1) -> int:
        """Bytes of the pipelined operand tiles; ``products``: the number of B tiles per A tile."""
        columns = self.block_m + products * self.block_n
        return self.num_stages * self.block_k * columns * itemsize

    def meta(self) -> dict[str, int]:
        """The settings of our kernels as keyword arguments of a kernel launch."""
        meta = dict(
            BM=self.block_m,
            BN=self.block_n,
            BK=self.block_k,
            GROUP=self.group_m,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )
        # AMD's compiler does not know the option.
        return meta | {"maxnreg": self.maxnreg} if self.maxnreg else meta


def products_of(kernel: str) -> int:
    """The number of B tiles that a kernel holds per A tile."""
    return 2 if kernel == "gated_up" else 1


def memory_of(
    config: Config, kernel: str, dtype: torch.dtype, target: str, gathered: bool = False
) -> int:
    """Bytes of shared memory that the compiled pipeline of a product takes, as its code shows.

    ``mma.sync`` reads its operands from registers, so that a tile leaves its buffer a step earlier
    than with ``wgmma`` and ``tcgen05``. Where the addresses of a step are loaded themselves
    (``gathered``), half of the steps are spent on them; their indices take memory, too.
    """
    buffers = config.num_stages
    if dtype.itemsize == 2 and target.startswith("sm_"):
        early = target not in DATA_CENTRE
        buffers = (buffers + 1 - early) // 2 if gathered else buffers - early
    buffers = max(1, buffers)
    tiles = replace(config, num_stages=buffers).shared_memory(dtype.itemsize, products_of(kernel))
    return tiles + (8 * config.block_k * (buffers - 1) if gathered else 0)


def why_not(
    config: Config,
    kernel: str,
    dtype: torch.dtype,
    target: str,
    n: int,
    k: int,
    gathered: bool = False,
) -> str | None:
    """Why a product cannot be computed by ``config`` on ``target``; ``None`` if it can.

    Args:
        kernel, dtype, target, n, k: as in :func:`heuristic`.
        gathered: whether "grad_weight" gathers rows of an operand.
    """
    if config.descriptors:
        reason = _why_no_descriptors(kernel, dtype, target, n, k)
        if reason is not None:
            return reason
    if config.persistent:
        reason = _why_not_persistent(config, kernel, dtype, target, n, k)
        if reason is not None:
            return reason
    if config.implementation == "grouped_mm":
        return _why_no_grouped_mm(kernel, dtype, target, n, k)
    if target == "interpreter":  # has no limit
        return None
    if config.maxnreg and not target.startswith("sm_"):
        return f"maxnreg is an option of NVIDIA's compiler; got {target}"
    needed = memory_of(config, kernel, dtype, target, gathered)
    limit = SHARED_MEMORY.get(target, LEAST_SHARED_MEMORY)
    if needed > limit:
        return f"it needs {needed} bytes of shared memory; this GPU has {limit}"
    return None


def _why_no_descriptors(kernel: str, dtype: torch.dtype, target: str, n: int, k: int) -> str | None:
    if kernel not in BY_DESCRIPTORS:
        return f"descriptors are for {', '.join(BY_DESCRIPTORS)}; got {kernel}"
    if target not in _WITH_TMA:
        return f"descriptors are used on {', '.join(DATA_CENTRE)}; got {target}"
    return _why_not_aligned("descriptors need", dtype, n, k)


def _why_not_persistent(
    config: Config, kernel: str, dtype: torch.dtype, target: str, n: int, k: int
) -> str | None:
    if kernel not in ("linear", "linear_transposed"):
        return f"persistent is for linear and linear_transposed; got {kernel}"
    if target not in _WITH_TMA:
        return f"persistent is for {', '.join(DATA_CENTRE)}; got {target}"
    if config.num_warps != 4:  # with more, the compiler specialises no warps, without a word
        return f"persistent needs num_warps = 4; got {config.num_warps}"
    if k % config.block_k:
        return f"persistent needs k in multiples of block_k = {config.block_k}; got {k}"
    if config.block_m > 128:
        return f"persistent needs block_m of 128 at most; got {config.block_m}"
    return _why_not_aligned("persistent needs", dtype, n, k)


def _why_not_aligned(who: str, dtype: torch.dtype, n: int, k: int) -> str | None:
    if (n * dtype.itemsize) % 16 == 0 and (k * dtype.itemsize) % 16 == 0:
        return None
    return f"{who} rows of multiples of 16 bytes; got n = {n}, k = {k} in {dtype}"


def _why_no_grouped_mm(kernel: str, dtype: torch.dtype, target: str, n: int, k: int) -> str | None:
    if kernel not in BY_GROUPED_MM:
        return f"grouped_mm is for {', '.join(BY_GROUPED_MM)}; got {kernel}"
    # Elsewhere grouped_mm is slow, or waits for the offsets; on the CPU only tests use it.
    if target != "interpreter" and (target not in DATA_CENTRE or dtype != torch.bfloat16):
        where = ", ".join(DATA_CENTRE)
        return f"grouped_mm is used for bfloat16 on {where}; got {dtype} on {target}"
    return _why_not_aligned("grouped_mm needs", dtype, n, k)


def fit(config: Config, itemsize: int, products: int, limit: int) -> Config:
    """``config`` made smaller until its operand tiles fit ``limit`` bytes of shared memory.

    It first reduces the number of pipeline stages, down to two, then the tile's size along k.
    """
    while config.shared_memory(itemsize, products) > limit:
        if config.num_stages > 2:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_k > SMALLEST_DOT:
            config = replace(config, block_k=config.block_k // 2)
        else:
            raise ValueError(f"{config} needs more than the {limit} bytes of shared memory here.")
    return config


def heuristic(
    kernel: str, dtype: torch.dtype, target: str, n: int, k: int, rows_per_expert: int = _FEW_ROWS
) -> Config:
    """The configuration for shapes that no table has.

    Args:
        kernel: one of ``KERNELS``.
        target: ``"sm_90"``, ``"gfx942"``, ... , or ``"interpreter"``.
        n, k: sizes of the product. If they are no multiples of 16, rows are not aligned for wide
            loads and every element needs an address of its own; then tiles are small.
        rows_per_expert: if so few that more than half of a tile would be empty, tiles get 64
            rows.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}.")
    if target == "interpreter":  # its time depends on the number of operations, not on their size
        return Config(32, 32, 32, num_warps=4, num_stages=1)
    columns = 64 if kernel.startswith("gated") else 128
    if n % 16 or k % 16:
        rows, depth, warps = (64, 32, 4) if dtype.itemsize == 2 else (32, 16, 8)
        config = Config(rows, 32, depth, num_warps=warps, num_stages=2)
    elif dtype == torch.float32:
        columns = 32 if kernel.endswith("grad_hidden") else columns // 2
        config = Config(64, columns, 32, num_warps=8, num_stages=3)
    elif target.startswith("gfx"):
        config = Config(128, columns, 32, num_warps=8, num_stages=2)
    elif target == "sm_90" and (kernel.endswith("up") or kernel.endswith("grad_hidden")):
        # Two programs per multiprocessor, so that one multiplies while the other finishes a tile.
        config = Config(128, columns, 64, num_warps=8, num_stages=3, parts=4, maxnreg=128)
    elif target in DATA_CENTRE and not kernel.endswith("grad_hidden"):
        # Wider tiles read less through the cache, which would limit tiles of 128 columns.
        # grad_weight loads its addresses too; its pipeline has one stage fewer than configured.
        stages = 4 if kernel == "grad_weight" else 3
        config = Config(128, 2 * columns, 64, num_warps=8, num_stages=stages)
    elif kernel == "gated_up":  # deeper tiles spill on sm_80
        config = Config(128, columns, 32, num_warps=8, num_stages=4)
    else:
        config = Config(128, columns, 64, num_warps=8, num_stages=3)
    if rows_per_expert < _FEW_ROWS and config.block_m > 64 and kernel != "grad_weight":
        # A warp group multiplies at least 64 rows; reading the weights takes longer than that.
        config = replace(config, block_m=64, maxnreg=0)
    limit = SHARED_MEMORY.get(target, LEAST_SHARED_MEMORY)
    return fit(config, dtype.itemsize, products_of(kernel), limit)
