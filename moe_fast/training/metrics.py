"""Averages metrics on the device, and copies them to the host only when they are logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """The mean of each metric over the calls of :meth:`add` since the last :meth:`pop`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._calls: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one value, a [] tensor, to each metric, without synchronizing with the device."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._calls[name] = self._calls.get(name, 0) + 1

    def pop(self, gather: Callable[[list[Any]], list[Any]] = list) -> dict[str, float]:
        """Return {metric: mean} with six significant digits, and reset the sums.

        Args:
            gather: a function that takes this process's one-element list and returns the list of
                all processes' elements, such as ``accelerate.utils.gather_object``. Processes may
                have different metrics.
        """
        own = self.state()
        self._sums, self._calls = {}, {}
        parts = gather([own])
        names = dict.fromkeys(name for part in parts for name in part)
        means = {}
        for name in names:
            totals, calls = zip(*(part[name] for part in parts if name in part), strict=True)
            means[name] = float(f"{sum(totals) / sum(calls):.6g}")
        return means

    def state(self) -> dict[str, tuple[float, int]]:
        """Return {metric: (sum, number of calls)} since the last pop, of this process."""
        return {name: (total.item(), self._calls[name]) for name, total in self._sums.items()}

    def restore(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Set the sums to a result of :meth:`state`."""
        self._sums = {name: torch.tensor(total) for name, (total, _) in state.items()}
        self._calls = {name: calls for name, (_, calls) in state.items()}
