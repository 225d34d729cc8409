"""How products are computed: implementation and tile sizes, what fits a GPU, and a heuristic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .numerics import SMALLEST_DOT

# Shared memory that one program may use, in bytes; sm_100 and gfx942 as Triton knows them.
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# What parts we have no figure for can be trusted to have (sm_86, sm_89, sm_120).
LEAST_SHARED_MEMORY = 101_376
# A "linear_transposed" reads weights whose rows, not columns, are contiguous: another layout.
KERNELS = (
    "up",
    "gated_up",
    "linear",
    "linear_transposed",
    "grad_hidden",
    "gated_grad_hidden",
    "grad_weight",
)
# Fewer rows per expert than this leave half of a tile of 128 without any.
_FEW_ROWS = 64
# What computes a product; the first is ours. Products with an epilogue of their own are ours alone.
IMPLEMENTATIONS = ("triton", "grouped_mm")
BY_GROUPED_MM = ("linear", "linear_transposed", "grad_weight")
# Products whose operands can come by tensor descriptors, and the GPUs that copy tiles by them.
BY_DESCRIPTORS = ("up", "gated_up", "linear", "linear_transposed")
_WITH_TMA = ("sm_90", "sm_100", "interpreter")


@dataclass(frozen=True)
class Config:
    """How a grouped product [rows, n] = [rows, k] x [k, n] is computed.

    Attributes:
        descriptors: load operand tiles by tensor descriptors, gathered rows from a copy, instead of
            by pointers.
        implementation: one of ``IMPLEMENTATIONS``; "grouped_mm" has no use for the other settings.
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
    descriptors: bool = False
    implementation: str = "triton"

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            if size < SMALLEST_DOT or size & (size - 1):
                raise ValueError(
                    f"{name} must be a power of two, at least {SMALLEST_DOT}; got {size}."
                )
        if not isinstance(self.descriptors, bool):
            raise ValueError(f"descriptors must be true or false; got {self.descriptors!r}.")
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

    def shared_memory(self, itemsize: int, products: int = 1) -> int:
        """Bytes that the pipelined operand tiles take; ``products``: B tiles beside one A tile."""
        columns = self.block_m + products * self.block_n
        return self.num_stages * self.block_k * columns * itemsize

    def meta(self) -> dict[str, int]:
        """The settings of our kernels as keyword arguments of a kernel launch."""
        return dict(
            BM=self.block_m,
            BN=self.block_n,
            BK=self.block_k,
            GROUP=self.group_m,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def products_of(kernel: str) -> int:
    """B tiles that a kernel holds beside one A tile."""
    return 2 if kernel == "gated_up" else 1


def why_not(
    config: Config, kernel: str, dtype: torch.dtype, target: str, n: int, k: int
) -> str | None:
    """Why a product cannot be computed by ``config`` on ``target``; ``None`` if it can.

    Args:
        kernel, dtype, target, n, k: as in :func:`heuristic`.
    """
    if config.descriptors:
        reason = _why_no_descriptors(kernel, dtype, target, n, k)
        if reason is not None:
            return reason
    if config.implementation == "grouped_mm":
        return _why_no_grouped_mm(kernel, dtype, target, n, k)
    if target == "interpreter":  # has no such limit
        return None
    needed = config.shared_memory(dtype.itemsize, products_of(kernel))
    limit = SHARED_MEMORY.get(target, LEAST_SHARED_MEMORY)
    if needed > limit:
        return f"it needs {needed} bytes of shared memory; this GPU has {limit}"
    return None


def _why_no_descriptors(kernel: str, dtype: torch.dtype, target: str, n: int, k: int) -> str | None:
    if kernel not in BY_DESCRIPTORS:
        return f"descriptors are for {', '.join(BY_DESCRIPTORS)}; got {kernel}"
    if target not in _WITH_TMA:
        return f"descriptors are used on sm_90 and sm_100; got {target}"
    return _why_not_aligned("descriptors need", dtype, n, k)


def _why_not_aligned(who: str, dtype: torch.dtype, n: int, k: int) -> str | None:
    if (n * dtype.itemsize) % 16 == 0 and (k * dtype.itemsize) % 16 == 0:
        return None
    return f"{who} rows of multiples of 16 bytes; got n = {n}, k = {k} in {dtype}"


def _why_no_grouped_mm(kernel: str, dtype: torch.dtype, target: str, n: int, k: int) -> str | None:
    if kernel not in BY_GROUPED_MM:
        return f"grouped_mm is for {', '.join(BY_GROUPED_MM)}; got {kernel}"
    # Elsewhere it is slow, or waits for the offsets; on the CPU it serves tests.
    if target != "interpreter" and (target not in ("sm_90", "sm_100") or dtype != torch.bfloat16):
        return f"grouped_mm is used for bfloat16 on sm_90 and sm_100; got {dtype} on {target}"
    return _why_not_aligned("grouped_mm needs", dtype, n, k)


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


def heuristic(
    kernel: str, dtype: torch.dtype, target: str, n: int, k: int, rows_per_expert: int = _FEW_ROWS
) -> Config:
    """The configuration for shapes that no table has.

    Args:
        kernel: one of ``KERNELS``.
        target: ``"sm_90"``, ``"gfx942"``, ... , or ``"interpreter"``.
        n, k: sizes of the product. Where they are no multiples of 16, rows are not aligned to
            what the GPU loads at once, and every element has an address of its own: small tiles.
        rows_per_expert: where tiles would be half empty and more, they get 64 rows.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}.")
    if target == "interpreter":  # pays per program and per operation, whatever their size
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
    elif target in ("sm_90", "sm_100") and not kernel.endswith("grad_hidden"):
        # Wider tiles read less through the cache, which 128 columns would be bound by.
        # A pipeline whose addresses are themselves loaded is a stage shallower than it says.
        stages = 4 if kernel == "grad_weight" else 3
        config = Config(128, 2 * columns, 64, num_warps=8, num_stages=stages)
    elif kernel == "gated_up":  # deeper tiles spill on sm_80
        config = Config(128, columns, 32, num_warps=8, num_stages=4)
    else:
        config = Config(128, columns, 64, num_warps=8, num_stages=3)
    if rows_per_expert < _FEW_ROWS and config.block_m > 64 and kernel != "grad_weight":
        # The least that a warp group multiplies at once; reading the weights takes longer.
        config = replace(config, block_m=64)
    limit = SHARED_MEMORY.get(target, LEAST_SHARED_MEMORY)
    return fit(config, dtype.itemsize, products_of(kernel), limit)
