"""Averages of numbers that stay on the device until somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class RunningMeans:
    """The mean of each metric over the calls of :meth:`add` since the last :meth:`pop`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Adds [] tensors, without a sync."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._calls[name] = self._calls.get(name, 0) + 1

    def pop(self, reduce: Callable[[Tensor], Tensor] = lambda means: means) -> dict[str, float]:
        """The means by name, and starts afresh.

        Args:
            reduce: takes the means as one tensor, for averaging over processes.
        """
        names = list(self._sums)
        if not names:
            return {}
        means = reduce(torch.stack([self._sums[name] / self._calls[name] for name in names]))
        self._sums, self._calls = {}, {}
        return {name: round(mean, 4) for name, mean in zip(names, means.tolist(), strict=True)}
