"""Computes retrieval metrics per query by ir-measures, with trec_eval's and MS MARCO's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_fast.evaluation.optional import require

# {common name of a measure: its name in ir-measures}
_IR_MEASURES_NAMES = {"nDCG": "nDCG", "MRR": "RR", "Recall": "R", "MAP": "AP"}
MAP_DEPTH = 1000  # trec_eval's usual depth of a run


def check_measures(measures: Sequence[str]) -> int:
    """Return the number of documents per query that the measures need.

    Args:
        measures: ``"nDCG@k"``, ``"MRR@k"``, ``"Recall@k"``, ``"MAP@k"`` with k >= 1, or ``"MAP"``,
            which needs 1,000.

    Raises:
        ValueError: a measure is unknown or given twice, or there are none.
    """
    if not measures or len(set(measures)) < len(measures):
        raise ValueError(f"measures must be different, at least one; got {list(measures)}")
    return max(_parse(name)[1] for name in measures)


def query_scores(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str],
) -> dict[str, NDArray[np.float64]]:
    """Compute the metrics of every query.

    Args:
        run: {query: {document: score}}; equal scores are ranked as trec_eval does.
        qrels: {query: {document: relevance}}.
        measures: as in `check_measures`. nDCG is trec_eval's, with linear gains. For MRR, Recall
            and MAP a document with a relevance of 1 or more is relevant.

    Returns:
        {measure: [Q]}, in the order of `qrels`; 0 for a query that is not in the run.

    Raises:
        ValueError: as `check_measures`.
        ImportError: ir-measures is not installed.
    """
    check_measures(measures)
    ir_measures = require("ir_measures")
    names = {ir_measures.parse_measure(_parse(name)[0]): name for name in measures}
    place = {query: i for i, query in enumerate(qrels)}
    values = {name: np.zeros(len(place)) for name in measures}
    judged = {query: dict(relevances) for query, relevances in qrels.items()}
    found = {query: dict(scores) for query, scores in run.items()}
    for metric in ir_measures.iter_calc(list(names), judged, found):
        values[names[metric.measure]][place[metric.query_id]] = metric.value
    return values


def _parse(name: str) -> tuple[str, int]:
    """Return ir-measures' name of a measure, and the number of documents it needs."""
    base, at, cutoff = name.partition("@")
    if name == "MAP":
        return f"AP@{MAP_DEPTH}", MAP_DEPTH
    if base not in _IR_MEASURES_NAMES or not cutoff.isdigit() or int(cutoff) < 1:
        raise ValueError(
            f"measures: unknown measure {name!r}; allowed are "
            f"{', '.join(f'{known}@k' for known in _IR_MEASURES_NAMES)} with k >= 1, and MAP"
        )
    return f"{_IR_MEASURES_NAMES[base]}@{cutoff}", int(cutoff)
