"""Retrieval metrics from embeddings and relevance judgements, with intervals.

Search is exact. The metrics come from ir-measures (its trec_eval and MS MARCO implementations), the
intervals from ``scipy.stats.bootstrap``; nothing of either is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_fast.evaluation.optional import require

MEASURES: tuple[str, ...] = ("nDCG@10", "MRR@10", "Recall@10")
ALL_DOMAINS = "all"

# the names people use -> those of ir-measures
_IR_MEASURES_NAMES = {"nDCG": "nDCG", "MRR": "RR", "Recall": "R", "MAP": "AP"}


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    high: float


def search(
    queries: Any, documents: Any, *, k: int = 10, chunk_size: int = 4096
) -> tuple[NDArray[np.floating[Any]], NDArray[np.int64]]:
    """The k documents with the largest dot product for each query; equal scores: lower index first.

    Exact, in chunks: never more than ``chunk_size`` x ``chunk_size`` scores are held at once. For
    the cosine hand in normalised vectors.

    Args:
        queries: [Q, d], an array or a SciPy sparse matrix (TF-IDF).
        documents: [N, d], likewise.
        k: hits per query; all N documents when there are fewer.
        chunk_size: queries, and documents, per block of scores.

    Returns:
        (scores [Q, k], document indices [Q, k] int64), best first.

    Raises:
        ValueError: shapes that do not fit, no documents, or k or chunk_size below 1.
    """
    _check_search(queries, documents, k, chunk_size)
    scores, indices = [], []
    for start in range(0, queries.shape[0], chunk_size):
        block = _search_block(queries[start : start + chunk_size], documents, k, chunk_size)
        scores.append(block[0])
        indices.append(block[1])
    if not scores:  # no queries
        empty = min(k, documents.shape[0])
        return np.zeros((0, empty), np.float32), np.zeros((0, empty), np.int64)
    return np.concatenate(scores), np.concatenate(indices)


def _check_search(queries: Any, documents: Any, k: int, chunk_size: int) -> None:
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ValueError(
            "queries [Q, d] and documents [N, d] must be matrices of the same width; got "
            f"{tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    if documents.shape[0] == 0:
        raise ValueError("documents is empty; there is nothing to search")
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k and chunk_size must be at least 1; got k={k}, chunk_size={chunk_size}")


def _search_block(
    queries: Any, documents: Any, k: int, chunk_size: int
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Search for one chunk of queries: each chunk of documents is merged with the best so far."""
    best_scores: NDArray[Any] | None = None
    best_indices: NDArray[np.int64] = np.zeros((queries.shape[0], 0), np.int64)
    for start in range(0, documents.shape[0], chunk_size):
        product = queries @ documents[start : start + chunk_size].T
        scores = product.toarray() if hasattr(product, "toarray") else np.asarray(product)
        indices = np.broadcast_to(np.arange(start, start + scores.shape[1]), scores.shape)
        if best_scores is not None:
            scores = np.concatenate([best_scores, scores], axis=1)
            indices = np.concatenate([best_indices, indices], axis=1)
        # earlier columns have lower indices, so a stable sort settles ties as promised
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best_scores = np.take_along_axis(scores, order, axis=1)
        best_indices = np.take_along_axis(indices, order, axis=1)
    assert best_scores is not None
    return best_scores, best_indices


def retrieval_scores(
    queries: Any,
    documents: Any,
    qrels: Sequence[Mapping[int, int]],
    *,
    measures: Sequence[str] = MEASURES,
    chunk_size: int = 4096,
) -> dict[str, NDArray[np.float64]]:
    """Retrieval metrics of every query.

    Args:
        queries: [Q, d] embeddings, dense or sparse.
        documents: [N, d] likewise.
        qrels: for each query {document index: relevance}; at least one relevance must be positive.
        measures: ``"nDCG@k"``, ``"MRR@k"``, ``"Recall@k"``, ``"MAP@k"``.
        chunk_size: see `search`.

    Returns:
        {measure: [Q] float64}, in the queries' order. nDCG is trec_eval's (linear gains).

    Raises:
        ValueError: an unknown measure, a query without a relevant document, a document index out of
            range, or a number of judgements that is not the number of queries.
        ImportError: ir-measures is not installed.
    """
    ir_measures = require("ir_measures")
    parsed = {name: ir_measures.parse_measure(_ir_measures_name(name)) for name in measures}
    _check_qrels(qrels, queries.shape[0], documents.shape[0])
    depth = max((int(name.split("@")[1]) for name in measures), default=1)
    _, hits = search(queries, documents, k=depth, chunk_size=chunk_size)
    # trec_eval sorts again and breaks ties its own way: falling whole numbers keep the order of
    # `search`
    run = {
        str(q): {str(document): float(depth - rank) for rank, document in enumerate(row)}
        for q, row in enumerate(hits.tolist())
    }
    judged = {str(q): {str(d): int(r) for d, r in row.items()} for q, row in enumerate(qrels)}
    names = {measure: name for name, measure in parsed.items()}
    values = {name: np.zeros(len(qrels)) for name in measures}
    for metric in ir_measures.iter_calc(list(parsed.values()), judged, run):
        values[names[metric.measure]][int(metric.query_id)] = metric.value
    return values


def _ir_measures_name(name: str) -> str:
    base, _, cutoff = name.partition("@")
    if base not in _IR_MEASURES_NAMES or not cutoff.isdigit() or int(cutoff) < 1:
        raise ValueError(
            f"measures: unknown measure {name!r}; allowed are "
            f"{', '.join(f'{known}@k' for known in _IR_MEASURES_NAMES)} with k >= 1"
        )
    return f"{_IR_MEASURES_NAMES[base]}@{cutoff}"


def _check_qrels(qrels: Sequence[Mapping[int, int]], num_queries: int, num_documents: int) -> None:
    if len(qrels) != num_queries:
        raise ValueError(f"qrels has {len(qrels)} entries for {num_queries} queries")
    for query, judged in enumerate(qrels):
        if not any(relevance > 0 for relevance in judged.values()):
            raise ValueError(f"qrels[{query}] names no relevant document")
        outside = [document for document in judged if not 0 <= document < num_documents]
        if outside:
            raise ValueError(
                f"qrels[{query}]: document index {outside[0]} is out of range for "
                f"{num_documents} documents"
            )


def mean_scores(
    scores: Mapping[str, NDArray[np.float64]], domains: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Means per domain and over all queries.

    Args:
        scores: output of `retrieval_scores`, {measure: [Q]}.
        domains: [Q], the domain of each query.

    Returns:
        {domain: {measure: mean}}, domains sorted, then ``"all"``: the mean over all queries.

    Raises:
        ValueError: lengths that differ.
    """
    labels = np.asarray(domains)
    for measure, values in scores.items():
        if len(values) != len(labels):
            raise ValueError(f"{len(labels)} domains for {len(values)} values of {measure}")
    groups = {name: labels == name for name in sorted(set(domains))}
    groups[ALL_DOMAINS] = np.ones(len(labels), dtype=bool)
    return {
        name: {measure: float(values[chosen].mean()) for measure, values in scores.items()}
        for name, chosen in groups.items()
    }


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over queries with its percentile bootstrap interval.

    Args:
        values: [Q], one number per query.
        confidence: of the interval, between 0 and 1.
        resamples: bootstrap samples.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: fewer than two values, or a confidence outside (0, 1).
        ImportError: scipy is not installed.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2:
        raise ValueError(f"values must be [Q] with Q >= 2; got shape {sample.shape}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1; got {confidence}")
    result = require("scipy.stats").bootstrap(
        (sample,),
        np.mean,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=256,  # bounds the memory: resamples are drawn 256 x Q at a time
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Estimate(float(sample.mean()), float(interval.low), float(interval.high))


def paired_difference(
    system: ArrayLike,
    baseline: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Mean of system minus baseline over the same queries, with its bootstrap interval.

    Queries are resampled in pairs, so what makes a query hard for both systems cancels.

    Args:
        system, baseline: [Q] each, in the same order of queries.
        confidence, resamples, seed: see `bootstrap_interval`.

    Raises:
        ValueError: different shapes, or as `bootstrap_interval`.
    """
    first, second = np.asarray(system, np.float64), np.asarray(baseline, np.float64)
    if first.shape != second.shape:
        raise ValueError(
            f"system and baseline must have one shape; got {first.shape}, {second.shape}"
        )
    return bootstrap_interval(first - second, confidence=confidence, resamples=resamples, seed=seed)
