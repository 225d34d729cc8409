"""The result of an evaluation: metrics with intervals, per domain and over all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_fast.evaluation.bootstrap import bootstrap_bounds, check_bootstrap

ALL_DOMAINS = "all"
_SAME_SETTINGS = ("f1_threshold",)  # that give one metric two meanings

Metrics = dict[str, dict[str, Any]]  # {domain or "all": {metric: ...}}


@dataclass(frozen=True)
class Score:
    """A metric, and its bootstrap interval (NaN where there is none)."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the intervals.

    Attributes:
        confidence: between 0 and 1.
        resamples: how many; 0 for no intervals.
        seed: of the resampling.
    """

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_bootstrap(self.confidence, max(self.resamples, 1))
        if self.resamples < 0:
            raise ValueError(f"resamples must be at least 0; got {self.resamples}")


class Items(Protocol):
    """The scored items of one evaluation (pairs, or queries), which can be resampled.

    Attributes:
        fingerprint: of the data alone, so that two models' items can be known to be the same.
        strata: numbers of the items of each stratum; sizes stay the same in every resample.
        sizes: {group: number of items}.
    """

    fingerprint: str
    strata: list[NDArray[np.int64]]
    sizes: dict[str, int]

    def metrics(self) -> Metrics:
        """{group: {metric: value}}, by the library of the task."""
        ...

    def resampled(self, rows: NDArray[np.int64]) -> Metrics:
        """The same of resamples: items [R, N] -> {group: {metric: [R] float64}}."""
        ...


class GroupedItems(Items):
    """Items in groups that are resampled within their domain; a subclass has `resampled`.

    Args:
        domains: [N] names, or ``None``.
        size: N, at least 1.
        fingerprint: of the data.
    """

    def __init__(self, domains: Sequence[str] | None, size: int, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.groups = by_group(domains, size)
        self.strata = list(self.groups.values())[:-1] or [self.groups[ALL_DOMAINS]]
        self.sizes = {group: len(rows) for group, rows in self.groups.items()}
        # where each group stands in a resample, whose columns are the strata side by side
        self.drawn = np.concatenate(self.strata)
        self.columns = {g: np.isin(self.drawn, rows) for g, rows in self.groups.items()}

    def metrics(self) -> Metrics:
        """Those of the one sample that has every item once."""
        return {
            group: {name: float(values[0]) for name, values in metrics.items()}
            for group, metrics in self.resampled(self.drawn[None]).items()
        }


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one model on one data set.

    Attributes:
        task: ``"pairs"``, ``"retrieval"`` or ``"sts"``.
        model: the model's name.
        scores: {domain, last ``"all"``: {metric: `Score`}}.
        details: {domain or ``"all"``: {name: number}}: sizes, and numbers without an interval.
        settings: how it was measured, ready for JSON.
        items: the score of each item, for `compare`.
    """

    task: str
    model: str
    scores: dict[str, dict[str, Score]]
    details: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    items: Any = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the items, ready for JSON; what is undefined is ``None``."""
        return json_ready({name: value for name, value in vars(self).items() if name != "items"})


@dataclass(frozen=True)
class Comparison:
    """The difference of two models on the same items.

    Attributes:
        task: as in `Evaluation`.
        first, second: the models' names; the differences are first minus second.
        differences: {domain, last ``"all"``: {metric: `Score`}}.
        settings: of the bootstrap.
    """

    task: str
    first: str
    second: str
    differences: dict[str, dict[str, Score]]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; what is undefined is ``None``."""
        return json_ready(vars(self))


def evaluation_of(
    task: str,
    model: str,
    items: Items,
    *,
    details: dict[str, dict[str, Any]],
    settings: dict[str, Any],
    bootstrap: Bootstrap | None,
) -> Evaluation:
    """The metrics of `items` with their intervals; none for a group of fewer than two items."""
    bootstrap = bootstrap or Bootstrap()
    scores = _with_intervals(items.metrics(), items, items.resampled, bootstrap)
    settings = settings | {"bootstrap": asdict(bootstrap)}
    return Evaluation(task, model, scores, details, settings, items)


def compare(
    first: Evaluation, second: Evaluation, *, bootstrap: Bootstrap | None = None
) -> Comparison:
    """Returns the metrics' differences, first minus second, with paired bootstrap intervals.

    Both are computed on the same resamples of the same items, so what makes an item hard for both
    cancels. A difference is significant where its interval leaves out zero.

    Args:
        first, second: evaluations of two models on the same data, with the same settings.
        bootstrap: settings of the intervals; by default those of `first`.

    Raises:
        ValueError: another task, other items, other metrics, or F1 at thresholds of another kind.
    """
    if first.task != second.task or first.items.fingerprint != second.items.fingerprint:
        raise ValueError(
            f"first ({first.model}: {first.task}) and second ({second.model}: {second.task}) were "
            "not measured on the same items"
        )
    for name in _SAME_SETTINGS:
        if first.settings.get(name) != second.settings.get(name):
            raise ValueError(
                f"first and second must have the same {name}; got {first.settings.get(name)!r} "
                f"and {second.settings.get(name)!r}"
            )
    names = {group: list(scores) for group, scores in first.scores.items()}
    if names != {group: list(scores) for group, scores in second.scores.items()}:
        raise ValueError("first and second have different metrics: use the same settings for both")
    bootstrap = bootstrap or Bootstrap(**first.settings["bootstrap"])
    # Pairs have no ids, and equal fingerprints only in the same order; queries go by their ids.
    ordered = hasattr(second.items, "in_order_of")
    items = second.items.in_order_of(first.items) if ordered else second.items
    values = _subtract(first.items.metrics(), items.metrics())

    def resampled(rows: NDArray[np.int64]) -> Metrics:
        return _subtract(first.items.resampled(rows), items.resampled(rows))

    differences = _with_intervals(values, first.items, resampled, bootstrap)
    settings = {"bootstrap": asdict(bootstrap)}
    return Comparison(first.task, first.model, second.model, differences, settings)


def _subtract(first: Metrics, second: Metrics) -> Metrics:
    return {
        group: {name: value - second[group][name] for name, value in metrics.items()}
        for group, metrics in first.items()
    }


def _with_intervals(
    values: Metrics, items: Items, resampled: Any, bootstrap: Bootstrap
) -> dict[str, dict[str, Score]]:
    """`values` as scores, with bounds from the `resampled` metrics."""
    places = [(group, name) for group, metrics in values.items() for name in metrics]
    low = high = np.full(len(places), np.nan)
    if bootstrap.resamples:

        def statistic(rows: NDArray[np.int64]) -> NDArray[np.float64]:
            metrics = resampled(rows)
            return np.stack([metrics[group][name] for group, name in places])

        low, high = bootstrap_bounds(items.strata, statistic, **asdict(bootstrap))
    scores: dict[str, dict[str, Score]] = {group: {} for group in values}
    for (group, name), lower, upper in zip(places, low, high, strict=True):
        bounds = (lower, upper) if items.sizes[group] > 1 else (math.nan, math.nan)
        scores[group][name] = Score(float(values[group][name]), *map(float, bounds))
    return scores


def fingerprint(*data: Any) -> str:
    """A hash of what JSON can hold, and of NumPy's numbers."""
    text = json.dumps(data, default=lambda number: number.item())
    return hashlib.sha256(text.encode()).hexdigest()


def by_group(domains: Sequence[str] | None, size: int) -> dict[str, NDArray[np.int64]]:
    """Items of each domain, sorted by name, and last of all; ``None``: of all only.

    Raises:
        ValueError: a domain called ``"all"``, the name of the whole.
    """
    names = np.asarray(domains if domains is not None else [])
    if ALL_DOMAINS in names:
        raise ValueError(f"domain: {ALL_DOMAINS!r} is the name of all domains together; rename it")
    groups = {str(name): np.flatnonzero(names == name) for name in sorted(set(names.tolist()))}
    return groups | {ALL_DOMAINS: np.arange(size)}


def json_ready(value: Any) -> Any:
    """`value` with scores as dicts, and ``None`` for NaN and infinities, which JSON cannot hold."""
    if isinstance(value, Score):
        value = vars(value)
    if isinstance(value, dict):
        return {key: json_ready(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(entry) for entry in value]
    if isinstance(value, np.generic):
        return json_ready(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
