"""The limits of this machine, measured in the same run as the figures, and its noise.

The floor of a row is the larger of its FLOP over the matrix rate, and its bytes over the bandwidth.
The matrix rate is the better one of ``torch.mm`` and oneDNN's linear layer: on AMD processors the
BLAS behind ``mm`` reaches half of the float32 peak, and no library should be able to beat a floor.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

DTYPES = (torch.float32, torch.bfloat16)
MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Machine:
    """The limits of this machine, with the threads that torch may use.

    Attributes:
        copy_bandwidth: bytes per second of a copy, read and written.
        read_bandwidth: bytes per second of a sum.
        matrix_rate: FLOP per second of a product of two square matrices, by dtype.
    """

    copy_bandwidth: float
    read_bandwidth: float
    matrix_rate: dict[str, float]

    def __str__(self) -> str:
        rates = ", ".join(f"{r / 1e9:.0f} GFLOP/s in {d}" for d, r in self.matrix_rate.items())
        return (
            f"{rates}; copying {self.copy_bandwidth / 1e9:.1f} GB/s, reading "
            f"{self.read_bandwidth / 1e9:.1f} GB/s"
        )

    def floor_seconds(self, flop: float, moved: float, dtype: str) -> float | None:
        """Return the least time for ``flop`` and ``moved`` bytes; None for a dtype not measured."""
        bandwidth = max(self.copy_bandwidth, self.read_bandwidth)
        if flop and dtype not in self.matrix_rate:
            return None
        return max(flop / self.matrix_rate[dtype] if flop else 0.0, moved / bandwidth)


def measure_machine(mebibytes: int = 256, size: int = 1536, repeats: int = 7) -> Machine:
    """Measure the limits; each is the best of ``repeats``, which other processes disturbed least.

    Args:
        mebibytes: the size of the buffer that is copied and read; several times the last cache.
        size: the numbers of rows and of columns of the matrices.
    """
    source = torch.ones(mebibytes * MEBIBYTE // 4)
    target = torch.empty_like(source)
    rates = {}
    for dtype in DTYPES:
        seconds = min(best_of(run, repeats) for run in _products(size, dtype))
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return Machine(
        copy_bandwidth=2 * source.nbytes / best_of(lambda: target.copy_(source), repeats),
        read_bandwidth=source.nbytes / best_of(source.sum, repeats),
        matrix_rate=rates,
    )


def _products(size: int, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Return the ways that are tried to multiply two matrices [size, size]."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    ways: list[Callable[[], Any]] = [lambda: a @ b]
    if torch.backends.mkldnn.is_available():
        packed, weight = a.to_mkldnn(), b.to_mkldnn()
        with contextlib.suppress(RuntimeError):  # bfloat16 on a processor without AVX-512
            F.linear(packed, weight)
            ways.append(lambda: F.linear(packed, weight))
    return ways


@torch.inference_mode()
def best_of(run: Callable[[], Any], repeats: int) -> float:
    """Return the least seconds of ``repeats`` calls, after one that does not count."""
    run()
    return min(timeit.repeat(run, number=1, repeat=repeats))


def processor_share(seconds: float = 0.05) -> float:
    """Return the share of ``seconds`` that a busy thread of ours runs: 1 on an idle machine."""
    wall, cpu = time.perf_counter(), time.thread_time()
    while time.perf_counter() - wall < seconds:
        pass
    return min(1.0, (time.thread_time() - cpu) / (time.perf_counter() - wall))


def load_average() -> float | None:
    """Return the load average of the last minute; None if the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def noise(
    before: float | None, after: float | None, shares: list[float], threads: int
) -> list[str]:
    """Return the reasons why a run's figures are doubtful; empty for a quiet machine.

    Args:
        before, after: :func:`load_average` before and after the run. Up to 0.5 counts as quiet
            before; after the run, our own ``threads`` are allowed in addition.
        shares: :func:`processor_share`, several times during the run; their mean counts.
        threads: the number of threads of this run.
    """
    reasons = []
    if before is not None and before > 0.5:
        reasons.append(f"load average {before:.1f} before the run")
    if after is not None and after > threads + 0.5:
        reasons.append(f"load average {after:.1f} after it, on {threads} threads of its own")
    share = statistics.fmean(shares)
    if share < 0.95:
        reasons.append(f"a busy thread got {share:.0%} of a processor")
    return reasons
