"""How time grows with one size at a time: tokens, experts, K, width, batch.

Every point is an ordinary case with alternating, checked candidates. :func:`curves_of` fits
``value = c * size^p`` to each candidate's curve, by least squares of the logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import expert_mlp, info_nce, plan
from .cases import Case
from .problem import bert
from .record import Row


def cases(size: str) -> Iterator[Case]:
    """Yield the cases of all sweeps."""
    sizes = dict(tokens=1024, dim=384, k=1, experts=8)
    if size == "tiny":
        sizes |= dict(tokens=32, dim=16)
    steps = {"tiny": 3, "quick": 3, "default": 5}.get(size, 7)
    powers = [2**n for n in range(steps)]
    for letter, field, values in (
        ("T", "tokens", [sizes["tokens"] // 4 * n for n in powers]),
        ("E", "experts", [2 * n for n in powers]),
        ("K", "k", [n for n in powers if n <= sizes["experts"]]),
        ("D", "dim", [max(2, sizes["dim"] // 8) * n for n in powers]),
    ):
        for value in values:
            shape = bert(**(sizes | {field: value}), dtype=torch.float32, bias=False)
            yield expert_mlp.case_of(shape, False, sweep=letter)
    tokens = sizes["tokens"]
    yield from (plan.case_of(tokens * 4 * n, plan.EXPERTS, 1, sweep="T") for n in powers)
    yield from (info_nce.case_of(tokens // 8 * n, sweep="B") for n in powers)


@dataclass(frozen=True)
class Curve:
    """The seconds, or bytes, of one candidate as a function of one size.

    Attributes:
        operation, who, letter: the operation, the candidate and the letter of the size.
        sizes, values: the points, rising.
        exponent: p of the fit.
        error: the standard error of p, NaN for fewer than three points.
    """

    operation: str
    who: str
    letter: str
    sizes: list[int]
    values: list[float]
    exponent: float
    error: float


def curves_of(rows: Sequence[Row], value: Callable[[Row], float | None]) -> list[Curve]:
    """Return the curves of ``value`` in ``rows`` that have more than one point."""
    groups: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row.sweep and (found := value(row)):
            point = (row.shape[row.sweep], found)
            groups.setdefault((row.operation, row.who, row.sweep), []).append(point)
    return [
        Curve(*key, [n for n, _ in sorted(points)], [v for _, v in sorted(points)], *fit(points))
        for key, points in groups.items()
        if len({size for size, _ in points}) > 1
    ]


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the slope of log(value) over log(size), and its standard error."""
    x, y = np.log(np.asarray(points, dtype=np.float64)).T
    if len(points) < 3:
        return float(np.polyfit(x, y, 1)[0]), math.nan
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    return float(slope), math.sqrt(covariance[0, 0])
