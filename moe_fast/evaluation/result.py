"""Holds and compares results of evaluations: metrics with intervals, per domain and over all."""

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
_SAME_SETTINGS = ("f1_threshold",)  # settings that must be equal for metrics to be comparable

Metrics = dict[str, dict[str, Any]]  # {domain or "all": {metric: ...}}


@dataclass(frozen=True)
class Score:
    """The value of a metric, and the bounds of its bootstrap interval (NaN if there is none)."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Bootstrap:
    """Settings of the bootstrap intervals.

    Attributes:
        confidence: the confidence level, between 0 and 1.
        resamples: the number of resamples; 0 for no intervals.
        seed: of the resampling.

    Raises:
        ValueError: a value is out of range.
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
        fingerprint: a hash of the data alone, which is equal for two models evaluated on the same
            items.
        strata: the indices of the items of each stratum; its size is the same in every resample.
        sizes: {group: number of items}. A group is a domain, or ``"all"``.
    """

    fingerprint: str
    strata: list[NDArray[np.int64]]
    sizes: dict[str, int]

    def metrics(self) -> Metrics:
        """Return {group: {metric: value}}, computed by the library of the task."""
        ...

    def resampled(self, rows: NDArray[np.int64]) -> Metrics:
        """Compute {group: {metric: [R]}} of R resamples, given as indices of items [R, N]."""
        ...


class GroupedItems(Items):
    """Items that are resampled within their domains; a subclass implements `resampled`.

    Args:
        domains: the domain of each of the N items, or ``None``.
        size: N, at least 1.
        fingerprint: a hash of the data.
    """

    def __init__(self, domains: Sequence[str] | None, size: int, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.groups = by_group(domains, size)
        self.strata = list(self.groups.values())[:-1] or [self.groups[ALL_DOMAINS]]
        self.sizes = {group: len(rows) for group, rows in self.groups.items()}
        # the columns of each group in a resample, whose columns are the strata side by side
        self.drawn = np.concatenate(self.strata)
        self.columns = {g: np.isin(self.drawn, rows) for g, rows in self.groups.items()}

    def metrics(self) -> Metrics:
        """Return {group: {metric: value}} of the sample that has every item once."""
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
        """Return everything except the items as JSON can hold it; undefined values are ``None``."""
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
        """Return the comparison as JSON can hold it; undefined values are ``None``."""
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
    """Compute the metrics of `items` with intervals; a group of one item has no intervals."""
    bootstrap = bootstrap or Bootstrap()
    scores = _with_intervals(items.metrics(), items, items.resampled, bootstrap)
    settings = settings | {"bootstrap": asdict(bootstrap)}
    return Evaluation(task, model, scores, details, settings, items)


def compare(
    first: Evaluation, second: Evaluation, *, bootstrap: Bootstrap | None = None
) -> Comparison:
    """Compute the differences of the metrics, first minus second, with paired bootstrap intervals.

    Both models' metrics are computed on the same resamples of the same items, so that the
    difficulty of the items, which affects both, cancels. A difference is significant if its
    interval does not contain zero.

    Args:
        first, second: evaluations of two models on the same data, with the same settings.
        bootstrap: settings of the intervals; by default those of `first`.

    Raises:
        ValueError: the tasks, the items or the metrics differ.
        ValueError: F1 has one shared threshold in one evaluation, and one per domain in the other.
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
    # Pairs have no ids; their fingerprints are equal only if the order is. Queries may be in
    # another order, and are matched by id.
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
    """Convert `values` to scores, with bounds from the `resampled` metrics."""
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
    """Hash data that JSON can hold, which may contain NumPy's numbers."""
    text = json.dumps(data, default=lambda number: number.item())
    return hashlib.sha256(text.encode()).hexdigest()


def by_group(domains: Sequence[str] | None, size: int) -> dict[str, NDArray[np.int64]]:
    """Return {domain: indices of its items}, sorted by name, and last ``"all"`` with all indices.

    If `domains` is ``None``, there is only ``"all"``.

    Raises:
        ValueError: a domain is called ``"all"``.
    """
    names = np.asarray(domains if domains is not None else [])
    if ALL_DOMAINS in names:
        raise ValueError(f"domain: {ALL_DOMAINS!r} is the name of all domains together; rename it")
    groups = {str(name): np.flatnonzero(names == name) for name in sorted(set(names.tolist()))}
    return groups | {ALL_DOMAINS: np.arange(size)}


def json_ready(value: Any) -> Any:
    """Convert scores to dicts, and NaN and infinities, which JSON cannot hold, to ``None``."""
    if isinstance(value, Score):
        value = vars(value)
    if isinstance(value, dict):
        return {key: json_ready(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(entry) for entry in value]
    if isinstance(value, np.generic):
        return json_ready(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
