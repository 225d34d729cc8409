"""Retrieval metrics of single queries, by ir-measures (trec_eval's and MS MARCO's programs)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_fast.evaluation.optional import require

# the names people use -> those of ir-measures
_IR_MEASURES_NAMES = {"nDCG": "nDCG", "MRR": "RR", "Recall": "R", "MAP": "AP"}
MAP_DEPTH = 1000  # trec_eval's usual depth of a run


def check_measures(measures: Sequence[str]) -> int:
    """How many documents per query the measures look at.

    Args:
        measures: ``"nDCG@k"``, ``"MRR@k"``, ``"Recall@k"``, ``"MAP@k"`` with k >= 1, or ``"MAP"``,
            which looks at 1,000.

    Raises:
        ValueError: an unknown measure, one twice, or none.
    """
    if not measures or len(set(measures)) < len(measures):
        raise ValueError(f"measures must be different, at least one; got {list(measures)}")
    return max(_parse(name)[1] for name in measures)


def query_scores(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    measures: Sequence[str],
) -> dict[str, NDArray[np.float64]]:
    """Metrics of every query.

    Args:
        run: {query: {document: score}}; equal scores are ranked trec_eval's way.
        qrels: {query: {document: relevance}}.
        measures: as in `check_measures`. nDCG is trec_eval's (linear gains); MRR, Recall and MAP
            count a relevance of 1 or more.

    Returns:
        {measure: [Q]}, in the order of `qrels`; 0 for a query that the run lacks.

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
    """ir-measures' name of a measure, and how many documents it looks at."""
    base, at, cutoff = name.partition("@")
    if name == "MAP":
        return f"AP@{MAP_DEPTH}", MAP_DEPTH
    if base not in _IR_MEASURES_NAMES or not cutoff.isdigit() or int(cutoff) < 1:
        raise ValueError(
            f"measures: unknown measure {name!r}; allowed are "
            f"{', '.join(f'{known}@k' for known in _IR_MEASURES_NAMES)} with k >= 1, and MAP"
        )
    return f"{_IR_MEASURES_NAMES[base]}@{cutoff}", int(cutoff)
