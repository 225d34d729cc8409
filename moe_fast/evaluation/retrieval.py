"""Evaluates retrieval: searches a corpus with a model and scores the hits.

The conventions are BEIR's: the document with the query's own id is removed from its hits
(``ignore_identical_ids``), a relevance above 0 means relevant, and queries without judgements are
not scored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.encoding.domains import domains_of
from moe_fast.encoding.options import EncodeOptions, Role, passes_domain
from moe_fast.encoding.vectors import embed
from moe_fast.evaluation.ir_metrics import check_measures, query_scores
from moe_fast.evaluation.nearest import search
from moe_fast.evaluation.result import (
    ALL_DOMAINS,
    Bootstrap,
    Evaluation,
    GroupedItems,
    Metrics,
    evaluation_of,
    fingerprint,
)
from moe_fast.evaluation.trec import Run

if TYPE_CHECKING:
    from moe_fast.data import Retrieval

logger = logging.getLogger(__name__)

MEASURES: tuple[str, ...] = ("nDCG@10", "MRR@10", "Recall@10")
RUN_MEASURES: tuple[str, ...] = ("nDCG@5", "nDCG@10", "Recall@100")
RUN_DEPTH = 1000


class QueryItems(GroupedItems):
    """Q queries with their scores; the metrics are the means over the queries of each group.

    Attributes:
        queries: the ids of the queries.
        scores: {measure: [Q] float64}.
        domains: the domains of the queries, or ``None``.
        fingerprint: a hash of the data, which does not depend on the order of queries, documents
            and judgements.
    """

    def __init__(
        self,
        queries: Sequence[str],
        scores: dict[str, NDArray[np.float64]],
        domains: Sequence[str] | None,
        fingerprint: str,
    ) -> None:
        super().__init__(domains, len(queries), fingerprint)
        self.queries, self.scores, self.domains = list(queries), scores, domains

    def in_order_of(self, other: QueryItems) -> QueryItems:
        """Return a copy with the scores reordered to match the queries of `other`, by query id."""
        place = {query: row for row, query in enumerate(self.queries)}
        rows = np.array([place[query] for query in other.queries])
        scores = {name: values[rows] for name, values in self.scores.items()}
        return QueryItems(other.queries, scores, other.domains, self.fingerprint)

    def resampled(self, rows: NDArray[np.int64]) -> Metrics:
        """Compute the means of R resamples, given as indices of queries [R, Q]; [R] for each."""
        drawn = {name: values[rows] for name, values in self.scores.items()}
        return {
            group: {name: values[:, columns].mean(-1) for name, values in drawn.items()}
            for group, columns in self.columns.items()
        }


def evaluate_retrieval(
    model: Any,
    retrieval: Retrieval,
    *,
    measures: Sequence[str] = MEASURES,
    ignore_identical_ids: bool = True,
    name: str | None = None,
    encode: EncodeOptions | None = None,
    bootstrap: Bootstrap | None = None,
) -> Evaluation:
    """Search the corpus exactly, by cosine, and score the hits of each query.

    Args:
        model: anything with ``encode``, see `moe_fast.evaluation.embed`.
        retrieval: corpus, queries and qrels, see `moe_fast.data.read_retrieval`.
        measures: ``"nDCG@k"``, ``"MRR@k"``, ``"Recall@k"``, ``"MAP@k"``, ``"MAP"``.
        ignore_identical_ids: remove the document with the query's own id from the query's hits, as
            BEIR and MTEB do (in ArguAna and Quora the queries are documents of the corpus).
        name: the model's name in the result; by default that of its class.
        encode: how texts are encoded.
        bootstrap: settings of the intervals; queries are resampled within their domains.

    Returns:
        The `Evaluation` that `evaluate_run` returns.

    Raises:
        ValueError: as `retrieve` and `evaluate_run`.
        ImportError: ir-measures, scipy or scikit-learn is not installed.
    """
    depth = check_measures(measures)
    check_qrels(retrieval)
    run, settings = _retrieve(model, retrieval, depth, encode, ignore_identical_ids)
    return evaluate_run(
        run,
        retrieval,
        measures=measures,
        ignore_identical_ids=ignore_identical_ids,
        name=name or type(model).__name__,
        bootstrap=bootstrap,
        settings=settings,
    )


def retrieve(
    model: Any,
    retrieval: Retrieval,
    *,
    depth: int = RUN_DEPTH,
    ignore_identical_ids: bool = True,
    encode: EncodeOptions | None = None,
) -> Run:
    """Find the documents with the largest cosines for each query, by an exact search.

    Args:
        model: anything with ``encode``. If it has ``encode_query`` and ``encode_document``, these
            are used, unless ``encode.roles`` is False.
        retrieval: corpus and queries.
        depth: documents per query; all if there are fewer.
        ignore_identical_ids: leave out the document with the query's own id, as BEIR does.
        encode: how texts are encoded.

    Returns:
        {query: {document: score}}, best first. Documents with equal cosines are in the corpus's
        order, and each later one gets the next smaller float32 as its score, so that every program
        that sorts by score gives the same ranking.

    Raises:
        ValueError: there are no queries or no documents, or `depth` is below 1.
        ValueError: the model does not know a domain.
        ValueError: as `moe_fast.evaluation.embed`.
        ImportError: scikit-learn is not installed.
    """
    return _retrieve(model, retrieval, depth, encode, ignore_identical_ids)[0]


def _retrieve(
    model: Any,
    retrieval: Retrieval,
    depth: int,
    encode: EncodeOptions | None,
    ignore_identical_ids: bool,
) -> tuple[Run, dict[str, Any]]:
    """Do what `retrieve` does, and return the settings of the encoding as well."""
    options = encode or EncodeOptions()
    if options.roles is None:
        roles = hasattr(model, "encode_query") and hasattr(model, "encode_document")
        options = replace(options, roles=roles)
    known = None not in (retrieval.domains, retrieval.corpus_domains)
    pass_domain = passes_domain(model, options, known)
    if not retrieval.queries or not retrieval.corpus or depth < 1:
        raise ValueError(
            "retrieval needs queries, documents and a depth of at least 1; got "
            f"{len(retrieval.queries)}, {len(retrieval.corpus)} and {depth}"
        )
    if pass_domain:
        _check_domains(model, retrieval)

    def vectors(role: Role, texts: Mapping[str, str], names: Any) -> Any:
        given = [names[key] for key in texts] if pass_domain else None
        return embed(model, list(texts.values()), role, domains=given, options=options)

    queries = vectors("query", retrieval.queries, retrieval.domains)
    documents = vectors("document", retrieval.corpus, retrieval.corpus_domains)
    own = ignore_identical_ids and not retrieval.queries.keys().isdisjoint(retrieval.corpus)
    scores, hits = search(queries, documents, k=depth + own)
    run = _as_run(list(retrieval.queries), list(retrieval.corpus), scores, hits)
    if own:
        run = {query: _others(query, found, depth) for query, found in run.items()}
    return run, {"encode": asdict(options) | {"pass_domain": pass_domain}, "depth": depth}


def _others(query: str, hits: Mapping[str, float], depth: int | None = None) -> dict[str, float]:
    """Return the first `depth` hits without the query's own document; all if it is None."""
    return dict([hit for hit in hits.items() if hit[0] != query][:depth])


def _check_domains(model: Any, retrieval: Retrieval) -> None:
    """Raise ValueError, before anything is encoded, if the model does not know a domain."""
    known = set(domains_of(model))
    for kind, domains in (("queries", retrieval.domains), ("corpus", retrieval.corpus_domains)):
        unknown = sorted(set((domains or {}).values()) - known)
        if unknown and known:
            raise ValueError(
                f"{kind}: the domain {unknown[0]!r} is none of the model's; it knows "
                f"{', '.join(sorted(known))}"
            )


def _as_run(
    queries: list[str], documents: list[str], scores: NDArray[Any], hits: NDArray[np.int64]
) -> Run:
    """Return {query id: {document id: score}}, with scores that decrease at every rank."""
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
    ignore_identical_ids: bool = True,
    name: str = "run",
    bootstrap: Bootstrap | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score a run, such as one that another program wrote (`read_run`).

    Args:
        run: {query: {document: score}}; a query that is not in it scores 0.
        retrieval: the corpus, queries, qrels and, if known, the queries' domains.
        measures, ignore_identical_ids: see `evaluate_retrieval`.
        name: the run's name in the result.
        bootstrap: settings of the intervals.
        settings: further settings of the run, which are added to those of the result.

    Returns:
        An `Evaluation` with the means over the judged queries, computed by ir-measures (nDCG is
        trec_eval's, with linear gains), for each domain if the queries have domains, and over all.
        As in BEIR and trec_eval, a query without judgements is not scored, and a query without a
        relevant document scores 0. Details: the number of scored ``queries`` and of
        ``queries_without_relevant``; over all also ``queries_without_judgements``, and
        ``own_documents_ignored``, the queries whose own document in the corpus is ignored.

    Raises:
        ValueError: a measure is unknown.
        ValueError: the judgements cannot be scored, see `check_qrels`.
        ValueError: the run has a query or document that is not in `retrieval`.
        ImportError: ir-measures or scipy is not installed.
    """
    check_measures(measures)
    check_qrels(retrieval)
    _check_run(run, retrieval)
    if ignore_identical_ids:
        run = {query: _others(query, hits) for query, hits in run.items()}
    queries = [query for query in retrieval.queries if retrieval.qrels.get(query)]
    qrels = {query: retrieval.qrels[query] for query in queries}
    _warn_of_judgements(qrels, len(retrieval.queries), ignore_identical_ids)
    known = retrieval.domains
    items = QueryItems(
        queries,
        query_scores({query: run[query] for query in queries if query in run}, qrels, measures),
        None if known is None else [known[query] for query in queries],
        _fingerprint(retrieval, ignore_identical_ids),
    )
    details = _details(items, qrels)
    details[ALL_DOMAINS] |= {
        "queries_without_judgements": len(retrieval.queries) - len(queries),
        "own_documents_ignored": ignore_identical_ids
        * sum(query in retrieval.corpus for query in queries),
    }
    return evaluation_of(
        "retrieval",
        name,
        items,
        details=details,
        settings={
            "documents": len(retrieval.corpus),
            "ignore_identical_ids": ignore_identical_ids,
            **(settings or {}),
        },
        bootstrap=bootstrap,
    )


def evaluate_qrels(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    measures: Sequence[str] = RUN_MEASURES,
    ignore_identical_ids: bool = False,
    name: str = "run",
    bootstrap: Bootstrap | None = None,
) -> Evaluation:
    """Score a run against judgements alone, where queries and documents are not at hand.

    Args:
        run: {query: {document: score}}, as `read_run` returns it.
        qrels: {query: {document: relevance}}, as `moe_fast.data.read_qrels` returns it.
        measures: see `evaluate_retrieval`.
        ignore_identical_ids: remove the document with the query's own id from its hits; trec_eval
            does not.
        name: the run's name in the result.
        bootstrap: settings of the intervals.

    Returns:
        An `Evaluation` with the means over all judged queries; one that is not in the run scores 0,
        as with ``trec_eval -c``. Details: the number of ``queries``, of
        ``queries_without_relevant``, of ``queries_not_in_run``, and of the run's
        ``queries_without_judgements``, which are not scored.

    Raises:
        ValueError: a measure is unknown, no query has a relevant document, or none of the run's
            queries is judged.
        ImportError: ir-measures or scipy is not installed.
    """
    check_measures(measures)
    if not any(map(_relevant, qrels.values())):
        raise ValueError(f"qrels: none of the {len(qrels)} queries has a relevant document")
    found = {query: run[query] for query in qrels if query in run}
    if not found:
        raise ValueError(
            f"run: none of its {len(run)} queries is among the {len(qrels)} judged ones, such as "
            f"{next(iter(qrels))!r}; the run's are such as {next(iter(run), None)!r}"
        )
    unjudged = len(run) - len(found)
    if unjudged:
        logger.warning("%d of the run's %d queries have no judgements.", unjudged, len(run))
    if len(found) < len(qrels):
        missing = len(qrels) - len(found)
        logger.warning("%d of %d judged queries are not in the run: 0.", missing, len(qrels))
    if ignore_identical_ids:
        found = {query: _others(query, hits) for query, hits in found.items()}
    items = QueryItems(
        list(qrels),
        query_scores(found, qrels, measures),
        None,
        fingerprint(
            sorted((key, _sorted(row)) for key, row in qrels.items()), ignore_identical_ids
        ),
    )
    details = _details(items, qrels)
    details[ALL_DOMAINS] |= {
        "queries_not_in_run": len(qrels) - len(found),
        "queries_without_judgements": unjudged,
    }
    settings = {"ignore_identical_ids": ignore_identical_ids}
    return evaluation_of(
        "retrieval", name, items, details=details, settings=settings, bootstrap=bootstrap
    )


def _check_run(run: Mapping[str, Mapping[str, float]], retrieval: Retrieval) -> None:
    for query, hits in run.items():
        if query not in retrieval.queries:
            raise ValueError(f"run: query {query!r} is not among the {len(retrieval.queries)}")
        unknown = hits.keys() - retrieval.corpus.keys()
        if unknown:
            raise ValueError(f"run: query {query!r}: unknown document {min(unknown)!r}")


def _warn_of_judgements(
    qrels: Mapping[str, Mapping[str, int]], queries: int, ignore_identical_ids: bool
) -> None:
    """Warn of queries that are not scored, or whose relevant documents are missing or ignored."""
    if len(qrels) < queries:
        logger.warning(
            "%d of %d queries have no judgements and are not scored.", queries - len(qrels), queries
        )
    empty = sum(not _relevant(judged) for judged in qrels.values())
    if empty:
        logger.warning("%d of %d queries have no relevant document and score 0.", empty, len(qrels))
    own = sum(judged.get(query, 0) > 0 for query, judged in qrels.items())
    if own and ignore_identical_ids:
        logger.warning(
            "%d queries judge the document with their own id relevant, which is left out of their "
            "hits; ignore_identical_ids=False (--keep-identical-ids) keeps it.",
            own,
        )


def _relevant(judged: Mapping[str, int]) -> bool:
    return any(relevance > 0 for relevance in judged.values())


def _details(
    items: QueryItems, qrels: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Any]]:
    without = np.array([not _relevant(qrels[query]) for query in items.queries])
    return {
        group: {"queries": len(rows), "queries_without_relevant": int(without[rows].sum())}
        for group, rows in items.groups.items()
    }


def _fingerprint(retrieval: Retrieval, ignore_identical_ids: bool) -> str:
    """Hash the queries, judgements, domains and document ids, independently of their order."""
    parts = (retrieval.queries, retrieval.qrels, retrieval.domains or {})
    return fingerprint(
        *(sorted((key, _sorted(value)) for key, value in part.items()) for part in parts),
        sorted(retrieval.corpus),
        ignore_identical_ids,
    )


def _sorted(value: Any) -> Any:
    return sorted(value.items()) if isinstance(value, Mapping) else value


def check_qrels(retrieval: Retrieval) -> None:
    """Raise an error if the judgements cannot be scored; call it before anything is encoded.

    Raises:
        ValueError: the judgements name a query or document that does not exist.
        ValueError: no query has a relevant document.
        ValueError: only some queries have a domain.
    """
    for query, judged in retrieval.qrels.items():
        if query not in retrieval.queries:
            raise ValueError(f"qrels: query {query!r} is not among the queries")
        unknown = judged.keys() - retrieval.corpus.keys()
        if unknown:
            raise ValueError(f"qrels: query {query!r}: unknown document {min(unknown)!r}")
    if retrieval.queries and not any(map(_relevant, retrieval.qrels.values())):
        raise ValueError(
            f"qrels: none of the {len(retrieval.queries)} queries has a relevant document"
        )
    if retrieval.domains is not None:
        nameless = [query for query in retrieval.queries if query not in retrieval.domains]
        if nameless:
            raise ValueError(f"domains: {len(nameless)} queries have none, as {nameless[0]!r}")
