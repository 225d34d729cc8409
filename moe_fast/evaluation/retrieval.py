"""Retrieval: searching a corpus with a model, and scoring what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.evaluation.bootstrap import Estimate as Estimate
from moe_fast.evaluation.encoding import EncodeOptions, Role, embed, passes_domain
from moe_fast.evaluation.exact_search import search
from moe_fast.evaluation.ir_metrics import check_measures, query_scores
from moe_fast.evaluation.result import (
    ALL_DOMAINS,
    Bootstrap,
    Evaluation,
    Metrics,
    by_group,
    evaluation_of,
    fingerprint,
)
from moe_fast.evaluation.trec import Run

if TYPE_CHECKING:
    from moe_fast.data import Retrieval

MEASURES: tuple[str, ...] = ("nDCG@10", "MRR@10", "Recall@10")
RUN_DEPTH = 1000


class QueryItems:
    """Scored queries.

    Attributes:
        queries: [Q] their ids.
        scores: {measure: [Q] float64}.
        domains: [Q] names, or ``None``.
    """

    def __init__(
        self,
        queries: Sequence[str],
        scores: dict[str, NDArray[np.float64]],
        domains: Sequence[str] | None,
        fingerprint: str,
    ) -> None:
        self.queries, self.scores, self.domains = list(queries), scores, domains
        self.fingerprint = fingerprint
        self._groups = by_group(domains, len(queries))
        self.strata = list(self._groups.values())[:-1] or [self._groups[ALL_DOMAINS]]
        self.sizes = {group: len(rows) for group, rows in self._groups.items()}
        drawn = np.concatenate(self.strata)  # a resample's columns, side by side
        self._columns = {g: np.isin(drawn, rows) for g, rows in self._groups.items()}

    def metrics(self) -> Metrics:
        """Means over the queries of every group."""
        return {
            group: {name: float(values[rows].mean()) for name, values in self.scores.items()}
            for group, rows in self._groups.items()
        }

    def resampled(self, rows: NDArray[np.int64]) -> Metrics:
        """The means of resamples: queries [R, Q] -> [R] each."""
        drawn = {name: values[rows] for name, values in self.scores.items()}
        return {
            group: {name: values[:, columns].mean(-1) for name, values in drawn.items()}
            for group, columns in self._columns.items()
        }


def evaluate_retrieval(
    model: Any,
    retrieval: Retrieval,
    *,
    measures: Sequence[str] = MEASURES,
    name: str | None = None,
    encode: EncodeOptions | None = None,
    bootstrap: Bootstrap | None = None,
) -> Evaluation:
    """Search the corpus exactly, by cosine, and score each query's hits.

    Args:
        model: anything with ``encode``, see `moe_fast.evaluation.embed`.
        retrieval: corpus, queries and qrels, see `moe_fast.data.read_retrieval`.
        measures: ``"nDCG@k"``, ``"MRR@k"``, ``"Recall@k"``, ``"MAP@k"``, ``"MAP"``.
        name: of the model in the result; by default that of its class.
        encode: how texts are encoded.
        bootstrap: settings of the intervals; queries are resampled, within their domain.

    Returns:
        As `evaluate_run`.

    Raises:
        ValueError: as `retrieve` and `evaluate_run`.
        ImportError: ir-measures, scipy or scikit-learn is not installed.
    """
    depth = check_measures(measures)
    check_qrels(retrieval)
    run, settings = _retrieve(model, retrieval, depth, encode)
    return evaluate_run(
        run,
        retrieval,
        measures=measures,
        name=name or type(model).__name__,
        bootstrap=bootstrap,
        settings=settings,
    )


def retrieve(
    model: Any,
    retrieval: Retrieval,
    *,
    depth: int = RUN_DEPTH,
    encode: EncodeOptions | None = None,
) -> Run:
    """The best documents for each query, by an exact search with the cosine.

    Args:
        model: anything with ``encode``; its ``encode_query`` and ``encode_document``, where it has
            them, unless ``encode.roles`` says otherwise.
        retrieval: corpus and queries.
        depth: documents per query; all where there are fewer.
        encode: how texts are encoded.

    Returns:
        {query: {document: score}}, best first. Cosines equal to the last bit are ranked in the
        corpus's order, and the later one is given the next smaller float32, so that every program
        that sorts by score ranks the same.

    Raises:
        ValueError: no queries or no corpus, depth below 1, or as `moe_fast.evaluation.embed`.
        ImportError: scikit-learn is not installed.
    """
    return _retrieve(model, retrieval, depth, encode)[0]


def _retrieve(
    model: Any,
    retrieval: Retrieval,
    depth: int,
    encode: EncodeOptions | None,
) -> tuple[Run, dict[str, Any]]:
    """`retrieve`, and the settings of the encoding."""
    options = encode or EncodeOptions()
    if options.roles is None:
        roles = hasattr(model, "encode_query") and hasattr(model, "encode_document")
        options = replace(options, roles=roles)
    domains = retrieval.domains, retrieval.corpus_domains
    pass_domain = passes_domain(model, options, None not in domains)
    if not retrieval.queries or not retrieval.corpus or depth < 1:
        raise ValueError(
            "retrieval needs queries, documents and a depth of at least 1; got "
            f"{len(retrieval.queries)}, {len(retrieval.corpus)} and {depth}"
        )
    vectors = []
    sides: tuple[tuple[Role, Any, Any], ...] = (
        ("query", retrieval.queries, domains[0]),
        ("document", retrieval.corpus, domains[1]),
    )
    for role, texts, names in sides:
        given = [names[key] for key in texts] if pass_domain else None
        vectors.append(embed(model, list(texts.values()), role, domains=given, options=options))
    scores, hits = search(*vectors, k=depth)
    run = _as_run(list(retrieval.queries), list(retrieval.corpus), scores, hits)
    return run, {"encode": asdict(options) | {"pass_domain": pass_domain}, "depth": depth}


def _as_run(
    queries: list[str], documents: list[str], scores: NDArray[Any], hits: NDArray[np.int64]
) -> Run:
    """Hits by id, with scores that fall at every rank."""
    single = scores.astype(np.float32)
    for rank in range(1, single.shape[1]):
        below = np.nextafter(single[:, rank - 1], np.float32(-np.inf))
        single[:, rank] = np.minimum(single[:, rank], below)
    return {
        query: dict(zip((documents[hit] for hit in row), values, strict=True))
        for query, row, values in zip(queries, hits.tolist(), single.tolist(), strict=True)
    }


def evaluate_run(
    run: Mapping[str, Mapping[str, float]],
    retrieval: Retrieval,
    *,
    measures: Sequence[str] = MEASURES,
    name: str = "run",
    bootstrap: Bootstrap | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score a run, such as one that another program wrote (`read_run`).

    Args:
        run: {query: {document: score}}; a query that it lacks scores 0.
        retrieval: queries, qrels and, where known, the queries' domains.
        measures: see `evaluate_retrieval`.
        name: of the run in the result.
        bootstrap: settings of the intervals.
        settings: what else to say in the result about how the run was made.

    Returns:
        An `Evaluation`: means over the queries, by ir-measures (nDCG is trec_eval's, with linear
        gains), per domain where the queries have domains, and over all.

    Raises:
        ValueError: an unknown measure; a query without a relevant document; qrels of unknown
            documents or queries; a run with queries or documents that are not in `retrieval`.
        ImportError: ir-measures or scipy is not installed.
    """
    bootstrap = bootstrap or Bootstrap()
    check_measures(measures)
    check_qrels(retrieval)
    for query, hits in run.items():
        if query not in retrieval.queries:
            raise ValueError(f"run: query {query!r} is not among the {len(retrieval.queries)}")
        unknown = hits.keys() - retrieval.corpus.keys()
        if unknown:
            raise ValueError(f"run: query {query!r}: unknown document {min(unknown)!r}")
    queries = list(retrieval.queries)
    qrels = {query: retrieval.qrels[query] for query in queries}
    known = retrieval.domains
    items = QueryItems(
        queries,
        query_scores(run, qrels, measures),
        None if known is None else [known[query] for query in queries],
        fingerprint(retrieval.queries, retrieval.qrels, list(retrieval.corpus), known),
    )
    return evaluation_of(
        "retrieval",
        name,
        items,
        details={group: {"queries": size} for group, size in items.sizes.items()},
        settings={"documents": len(retrieval.corpus), **(settings or {})},
        bootstrap=bootstrap,
    )


def check_qrels(retrieval: Retrieval) -> None:
    """Refuse judgements that cannot be scored; call it before anything is encoded.

    Raises:
        ValueError: a query without a relevant document, judgements of an unknown query or
            document, or a query without a domain where others have one.
    """
    for query, judged in retrieval.qrels.items():
        if query not in retrieval.queries:
            raise ValueError(f"qrels: query {query!r} is not among the queries")
        unknown = judged.keys() - retrieval.corpus.keys()
        if unknown:
            raise ValueError(f"qrels: query {query!r}: unknown document {min(unknown)!r}")
    without = [
        query
        for query in retrieval.queries
        if not any(grade > 0 for grade in retrieval.qrels.get(query, {}).values())
    ]
    if without:
        raise ValueError(
            f"qrels: {len(without)} of {len(retrieval.queries)} queries have no relevant document, "
            f"as {without[0]!r}; leave them out"
        )
    if retrieval.domains is not None:
        nameless = [query for query in retrieval.queries if query not in retrieval.domains]
        if nameless:
            raise ValueError(f"domains: {len(nameless)} queries have none, as {nameless[0]!r}")


def retrieval_scores(
    queries: Any,
    documents: Any,
    qrels: Sequence[Mapping[int, int]],
    *,
    measures: Sequence[str] = MEASURES,
    chunk_size: int = 4096,
) -> dict[str, NDArray[np.float64]]:
    """Retrieval metrics of every query, from embeddings.

    Args:
        queries: [Q, d] embeddings, dense or sparse.
        documents: [N, d] likewise.
        qrels: for each query {document index: relevance}; at least one relevance must be positive.
        measures: see `evaluate_retrieval`.
        chunk_size: see `search`.

    Returns:
        {measure: [Q] float64}, in the queries' order. nDCG is trec_eval's (linear gains).

    Raises:
        ValueError: an unknown measure, a query without a relevant document, a document index out of
            range, or a number of judgements that is not the number of queries.
        ImportError: ir-measures is not installed.
    """
    depth = check_measures(measures)
    _check_index_qrels(qrels, queries.shape[0], documents.shape[0])
    _, hits = search(queries, documents, k=depth, chunk_size=chunk_size)
    # trec_eval sorts again and breaks ties its own way: falling whole numbers keep the order of
    # `search`
    run = {
        str(q): {str(document): float(depth - rank) for rank, document in enumerate(row)}
        for q, row in enumerate(hits.tolist())
    }
    judged = {str(q): {str(d): int(r) for d, r in row.items()} for q, row in enumerate(qrels)}
    return query_scores(run, judged, measures)


def _check_index_qrels(
    qrels: Sequence[Mapping[int, int]], num_queries: int, num_documents: int
) -> None:
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
