"""Measures the tokens per second of training steps, for the logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Throughput:
    """Sums the tokens without padding, and the time of their training steps, since the last pop."""

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._seconds = 0.0

    @contextmanager
    def timing(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Add the time of the block, a training step on ``inputs``, and the tokens of ``inputs``.

        Nothing waits for the device.
        """
        self._tokens = self._tokens + count_tokens(inputs)
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def pop(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """Return ``tokens_per_second`` of all processes together, and reset the sums.

        The result is empty if there were no tokens.

        Args:
            gather: as in :meth:`moe_fast.training.metrics.RunningMeans.pop`.
        """
        parts = gather([(int(self._tokens), self._seconds)])
        self._tokens, self._seconds = 0, 0.0
        tokens, seconds = sum(t for t, _ in parts), max(s for _, s in parts)
        return {"tokens_per_second": round(tokens / seconds, 1)} if tokens and seconds else {}


def count_tokens(inputs: Mapping[str, Any]) -> Tensor | int:
    """Count the tokens without padding of all text columns in a batch, padded or packed."""
    total: Tensor | int = 0
    for key, value in inputs.items():
        if key.endswith("attention_mask") and isinstance(value, Tensor):
            total = total + (value != 0).sum(dtype=torch.int64)
        elif key.endswith("cu_seq_lens_q"):
            total = total + value[-1].to(torch.int64)
    return total
