"""How time grows with one size at a time: tokens, experts, K, width, batch.

Every point is a case like any other, alternating and checked; :func:`exponents` fits
``seconds = c * size^p`` to each candidate's curve by least squares in the logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from . import expert_mlp, info_nce, plan
from .cases import Case
from .record import Row


def cases(size: str) -> Iterator[Case]:
    """The sweeps."""
    base = expert_mlp.Shape(1024, 384, 1, torch.float32)
    if size == "tiny":
        base = replace(base, tokens=32, dim=16)
    steps = {"tiny": 3, "quick": 3, "default": 5}.get(size, 7)
    powers = [2**n for n in range(steps)]
    for letter, field, values in (
        ("T", "tokens", [base.tokens // 4 * n for n in powers]),
        ("E", "experts", [2 * n for n in powers]),
        ("K", "k", [n for n in powers if n <= base.experts]),
        ("D", "dim", [max(2, base.dim // 8) * n for n in powers]),
    ):
        for value in values:
            shape = replace(base, **{field: value})
            yield expert_mlp.case_of(shape, False, sweep=letter)
    yield from (plan.case_of(base.tokens * 4 * n, plan.EXPERTS, 1, sweep="T") for n in powers)
    yield from (info_nce.case_of((base.tokens // 8) * n, sweep="B") for n in powers)


@dataclass(frozen=True)
class Curve:
    """One candidate's seconds over one size.

    Attributes:
        operation, who, letter: what, whose, over which size.
        sizes, seconds: the points, rising.
        exponent: p of the fit; error: its standard error, NaN for fewer than three points.
    """

    operation: str
    who: str
    letter: str
    sizes: list[int]
    seconds: list[float]
    exponent: float
    error: float


def exponents(rows: Sequence[Row]) -> list[Curve]:
    """The curves among ``rows``; those of one point are left out."""
    groups: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row.sweep and row.seconds:
            point = (row.shape[row.sweep], row.seconds.median)
            groups.setdefault((row.operation, row.who, row.sweep), []).append(point)
    return [
        Curve(*key, [n for n, _ in sorted(points)], [s for _, s in sorted(points)], *fit(points))
        for key, points in groups.items()
        if len({size for size, _ in points}) > 1
    ]


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope of log(seconds) over log(size), and its standard error."""
    x, y = np.log(np.asarray(points, dtype=np.float64)).T
    x = x - x.mean()
    slope = float((x * y).sum() / (x * x).sum())
    if len(points) < 3:
        return slope, math.nan
    residual = y - y.mean() - slope * x
    return slope, float(np.sqrt((residual**2).sum() / (len(x) - 2) / (x * x).sum()))
