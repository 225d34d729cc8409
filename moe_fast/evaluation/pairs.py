"""Evaluates pair classification: how well the cosine separates positives from negatives.

The measures are those of Hallee et al. (arXiv 2401.15713), F1max and the mean cosines of positives
and negatives, and in addition ROC-AUC and average precision, because F1max chooses its threshold on
the test set, and is at least 2/3 on balanced pairs.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moe_fast.encoding.options import EncodeOptions
from moe_fast.evaluation.columns import read_columns
from moe_fast.evaluation.cosines import embed_pairs, pairwise_cosine
from moe_fast.evaluation.result import (
    ALL_DOMAINS,
    Bootstrap,
    Evaluation,
    Metrics,
    by_group,
    evaluation_of,
    fingerprint,
)
from moe_fast.evaluation.threshold_counts import (
    Ladder,
    Resampled,
    best_accuracy_threshold,
    best_f1,
    counts_at,
    f1_of,
    labelled_ladder,
    off_diagonal_ladder,
    ranking_metrics,
)

Threshold = Literal["shared", "per_domain"]


class PairItems:
    """Pairs with their cosines, whose metrics are those of classification by a threshold.

    A group is a domain, or ``"all"``, which is last.

    Args:
        ladders: {group: its `Ladder`}.
        cosines: [N], the cosines of the pairs given.
        labels: [N] bool; ``None``: all pairs are positives, and the other combinations of their
            texts are negatives.
        threshold: whether F1 has one threshold for all domains or one for each.
        accuracy_thresholds: {group: threshold} chosen on a dev set, or ``None``.
        fingerprint: a hash of the data.
    """

    def __init__(
        self,
        ladders: dict[str, Ladder],
        cosines: NDArray[np.float64],
        labels: NDArray[np.bool_] | None,
        *,
        threshold: Threshold,
        accuracy_thresholds: dict[str, float] | None,
        fingerprint: str,
    ) -> None:
        self.ladders, self.cosines, self.labels = ladders, cosines, labels
        self.threshold, self.accuracy_thresholds = threshold, accuracy_thresholds
        self.fingerprint = fingerprint
        self.domains = [group for group in ladders if group != ALL_DOMAINS]
        self.sizes = {group: len(ladder.rows) for group, ladder in ladders.items()}
        parts = [ladders[group].rows for group in self.domains or [ALL_DOMAINS]]
        self.strata = [stratum for rows in parts for stratum in self._by_label(rows)]

    def _by_label(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if self.labels is None:
            return [rows]
        return [rows[self.labels[rows]], rows[~self.labels[rows]]]

    def metrics(self) -> Metrics:
        """Compute ROC-AUC, AP, F1max and, if there was a dev set, the accuracy of every group."""
        thresholds = self.f1_thresholds()
        correct = self._correct()
        found: Metrics = {}
        for group, ladder in self.ladders.items():
            found[group] = dict(ranking_metrics(ladder.totals))
            found[group]["F1max"] = float(f1_of(*self.counts(group, thresholds)))
            if correct is not None:
                found[group]["accuracy"] = float(correct[ladder.rows].mean())
        return found

    def f1_thresholds(self) -> dict[str, float]:
        """{group: the threshold of its F1}; "all" has one only if all domains share it."""
        if self.threshold == "shared":
            shared = best_f1(self.ladders[ALL_DOMAINS].totals)[1]
            return dict.fromkeys(self.ladders, shared)
        return {group: best_f1(self.ladders[group].totals)[1] for group in self.domains}

    def counts(self, group: str, thresholds: dict[str, float]) -> tuple[float, float, float]:
        """Count (true positives, false positives, positives) of a group at the given thresholds.

        For a group without a threshold, the counts of the domains are added up.
        """
        if group in thresholds:
            return counts_at(self.ladders[group].totals, thresholds[group])
        parts = [counts_at(self.ladders[d].totals, thresholds[d]) for d in self.domains]
        true, false, positives = np.sum(parts, axis=0).tolist()
        return true, false, positives

    def _correct(self) -> NDArray[np.float64] | None:
        """Return [N]: 1 if the dev set's threshold classifies a pair correctly, else 0.

        The result is ``None`` without a dev set or without labels.
        """
        if self.accuracy_thresholds is None or self.labels is None:
            return None
        correct = np.empty(len(self.cosines))
        for group in self.domains or [ALL_DOMAINS]:
            rows = self.ladders[group].rows
            predicted = self.cosines[rows] >= self.accuracy_thresholds[group]
            correct[rows] = predicted == self.labels[rows]
        return correct

    def resampled(self, rows: NDArray[np.int64]) -> Metrics:
        """Compute the metrics of R resamples, given as indices of pairs [R, N].

        The thresholds of F1 are chosen anew in each resample.

        Returns:
            {group: {metric: [R]}}.
        """
        size = len(self.cosines)
        flat = rows + size * np.arange(len(rows))[:, None]
        drawn_counts = np.bincount(flat.ravel(), minlength=size * len(rows))
        counts = drawn_counts.reshape(len(rows), size).astype(np.float32)
        drawn = {group: Resampled(ladder, counts) for group, ladder in self.ladders.items()}
        correct = self._correct()
        f1 = self._resampled_f1(drawn)
        found: Metrics = {}
        for group, ladder in self.ladders.items():
            found[group] = drawn[group].ranking_metrics() | {"F1max": f1[group]}
            if correct is not None:
                weights = counts[:, ladder.rows]
                found[group]["accuracy"] = weights @ correct[ladder.rows] / weights.sum(-1)
        return found

    def _resampled_f1(self, drawn: dict[str, Resampled]) -> dict[str, NDArray[np.float64]]:
        if self.threshold == "shared":
            shared = drawn[ALL_DOMAINS].best_f1()[1]
            return {group: f1_of(*counts.counts_at(shared)) for group, counts in drawn.items()}
        best = {group: drawn[group].best_f1() for group in self.domains}
        parts = [drawn[group].counts_at(best[group][1]) for group in self.domains]
        pooled = f1_of(*np.sum(parts, axis=0))
        return {group: f1 for group, (f1, _) in best.items()} | {ALL_DOMAINS: pooled}


def evaluate_pairs(
    model: Any,
    dataset: Any,
    *,
    dev: Any = None,
    threshold: Threshold = "shared",
    name: str | None = None,
    by_domain: bool = True,
    encode: EncodeOptions | None = None,
    bootstrap: Bootstrap | None = None,
) -> Evaluation:
    """Evaluate how well a model's cosine separates pairs that belong together from others.

    With labels, the negatives are the pairs labelled 0. Without labels (or if all are 1), every
    pair is a positive, and its `a` with the `b` of any other pair is a negative: of pairs of the
    same domain for the domain's metrics, of all pairs over all. Combinations that are themselves
    one of the pairs, or the same text twice, are no negatives. All N^2 combinations are used.

    Args:
        model: anything with ``encode``, see `moe_fast.evaluation.embed`.
        dataset: columns ``a``, ``b`` and, optionally, ``label`` (0 or 1) and ``domain``; see
            `moe_fast.data.read_pairs`.
        dev: labelled pairs on which the threshold of the accuracy is chosen (with
            ``threshold="per_domain"`` one for each domain). Without them there is no accuracy.
        threshold: ``"shared"``: F1max has one threshold, the best over all pairs, and a domain's F1
            is the one at this threshold. ``"per_domain"``: each domain has its best threshold, and
            over all, every pair is classified by the threshold of its domain.
        name: the model's name in the result; by default that of its class.
        by_domain: also compute each domain's metrics.
        encode: how texts are encoded.
        bootstrap: settings of the intervals. Pairs are resampled within each domain and label, and
            the threshold of F1 is chosen anew. Without labels, each `a` is resampled together with
            all its comparisons, while the `b` stay the same; if there are more than 1,000
            positives, at most 1,000 of their cosines are used as thresholds.

    Returns:
        An `Evaluation`. Metrics: ``"ROC-AUC"``, ``"AP"`` (average precision), ``"F1max"`` and, with
        `dev`, ``"accuracy"``. Details: the numbers of ``pairs``, ``positives`` and ``negatives``;
        the ``threshold`` (``None`` over all if there is one per domain), ``precision`` and
        ``recall`` of F1max; ``positive_mean`` and ``negative_mean``, the mean cosines, and their
        ``ratio``.

    Raises:
        ValueError: a column is missing, or a value is invalid; see
            `moe_fast.evaluation.columns.read_columns`.
        ValueError: a domain, or the whole data set, has no positives or no negatives.
        ValueError: `dev` is given and one of the data sets has no labels, or `dev` lacks a domain
            that needs a threshold.
        ValueError: `threshold` is unknown, or ``"per_domain"`` without domains.
        ValueError: as `moe_fast.evaluation.embed`.
        ImportError: scikit-learn or scipy is not installed.
    """
    data = PairData(dataset, by_domain=by_domain)
    # with a shared threshold the dev set's domains are not used
    dev_domains = by_domain and threshold == "per_domain"
    dev_data = None if dev is None else PairData(dev, "dev", by_domain=dev_domains)
    _check_threshold(threshold, data, dev_data)
    a, b, settings = embed_pairs(model, data.columns, encode)
    cosines = pairwise_cosine(a, b)
    chosen = None if dev_data is None else _dev_thresholds(model, dev_data, data, threshold, encode)
    items = PairItems(
        {group: data.ladder(a, b, cosines, rows) for group, rows in data.groups.items()},
        cosines,
        data.labels,
        threshold=threshold,
        accuracy_thresholds=chosen,
        fingerprint=fingerprint(data.columns),
    )
    settings |= {
        "negatives": "off-diagonal" if data.labels is None else "labelled",
        "f1_threshold": threshold,
        "accuracy_threshold": chosen or "no dev set was given, so no accuracy",
    }
    return evaluation_of(
        "pairs",
        name or type(model).__name__,
        items,
        details=_details(items),
        settings=settings,
        bootstrap=bootstrap,
    )


class PairData:
    """A checked data set of pairs.

    Attributes:
        columns: ``a``, ``b`` and, if there are any, ``label`` and ``domain``.
        labels: [N] bool, or ``None`` if all pairs are positives.
        groups: {domain, last ``"all"``: indices of its pairs}.

    Raises:
        ValueError: as `read_columns`; a group has no positives or no negatives.
    """

    def __init__(self, dataset: Any, argument: str = "dataset", *, by_domain: bool = True) -> None:
        self.columns = read_columns(dataset, ("a", "b"), ("label", "domain"), argument)
        labels = self.columns.get("label")
        self.labels = None if labels is None or all(labels) else np.asarray(labels, dtype=bool)
        domains = self.columns.get("domain") if by_domain else None
        self.groups = by_group(domains, len(self.columns["a"]))
        self._known = _known_pairs(self.columns) if self.labels is None else []
        for group, rows in self.groups.items():
            positives, negatives = self._has(rows)
            if not positives or not negatives:
                kind = "negatives" if positives else "positives"
                where = "" if group == ALL_DOMAINS else f" of domain {group!r}"
                raise ValueError(
                    f"{argument}: the {len(rows)} pairs{where} have no {kind}: there is nothing to "
                    "tell apart. Leave the domain out, or pass by_domain=False."
                )

    def _has(self, rows: NDArray[np.int64]) -> tuple[bool, bool]:
        """Return whether these pairs have positives, and whether they have negatives."""
        if self.labels is not None:
            return bool(self.labels[rows].any()), not self.labels[rows].all()
        return True, any(len(np.setdiff1d(rows, self._known[row])) for row in rows)

    def ladder(
        self, a: Any, b: Any, cosines: NDArray[np.float64], rows: NDArray[np.int64]
    ) -> Ladder:
        """Make the ladder of the pairs `rows`, from all pairs' vectors [N, d] and cosines [N]."""
        if self.labels is None:
            return off_diagonal_ladder(a, b, cosines, self._known, rows)
        return labelled_ladder(cosines, self.labels, rows)


def _known_pairs(columns: dict[str, list[Any]]) -> list[NDArray[np.int64]]:
    """Return for each `a` the indices of all `b` that are paired with it or are the same text."""
    places: dict[str, list[int]] = {}
    partners: dict[str, set[str]] = {}
    for row, (a, b) in enumerate(zip(columns["a"], columns["b"], strict=True)):
        places.setdefault(b, []).append(row)
        partners.setdefault(a, {a}).add(b)
    return [
        np.array([row for text in partners[a] for row in places.get(text, ())])
        for a in columns["a"]
    ]


def _check_threshold(threshold: str, data: PairData, dev: PairData | None) -> None:
    if threshold not in ("shared", "per_domain"):
        raise ValueError(f"threshold={threshold!r}; allowed are 'shared' and 'per_domain'")
    if threshold == "per_domain" and len(data.groups) == 1:
        raise ValueError("threshold='per_domain' needs a dataset with domains, and by_domain=True")
    if dev is None:
        return
    if data.labels is None or dev.labels is None:
        raise ValueError(
            "dev is for accuracy, which needs labelled pairs in dataset and dev: with positives "
            "only, nearly every combination is a negative and the accuracy always close to 1"
        )
    missing = sorted(data.groups.keys() - dev.groups.keys())
    if threshold == "per_domain" and missing:
        raise ValueError(f"dev has no pairs of the domains {missing}")


def _dev_thresholds(
    model: Any, dev: PairData, data: PairData, threshold: str, encode: EncodeOptions | None
) -> dict[str, float]:
    """Return {group of the data: the threshold with the largest accuracy on the dev set}."""
    a, b, _ = embed_pairs(model, dev.columns, encode)
    cosines = pairwise_cosine(a, b)
    groups = [ALL_DOMAINS] if threshold == "shared" else list(data.groups)
    found = {
        group: best_accuracy_threshold(dev.ladder(a, b, cosines, dev.groups[group]).totals)
        for group in groups
    }
    return {group: found.get(group, found[ALL_DOMAINS]) for group in data.groups}


def _details(items: PairItems) -> dict[str, dict[str, Any]]:
    """Return the numbers of every group that have no interval."""
    thresholds = items.f1_thresholds()
    details: dict[str, dict[str, Any]] = {}
    for group, ladder in items.ladders.items():
        true, false, positives = items.counts(group, thresholds)
        details[group] = {
            "pairs": len(ladder.rows),
            "positives": int(positives),
            "negatives": int(ladder.totals.negatives.sum()),
            "threshold": thresholds.get(group),
            "precision": true / (true + false) if true + false else None,
            "recall": true / positives,
            "positive_mean": ladder.positive_mean,
            "negative_mean": ladder.negative_mean,
            "ratio": ladder.positive_mean / ladder.negative_mean if ladder.negative_mean else None,
        }
    return details
