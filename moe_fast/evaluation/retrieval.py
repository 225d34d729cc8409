"""Evaluates retrieval: searches a corpus with a model and scores the hits.

BEIR's conventions: the document with the query's own id is no hit of it (``ignore_identical_ids``),
a relevance above 0 is relevant, and queries without judgements are not scored.
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
RUN_DEPTH = 1000


class QueryItems(GroupedItems):
    """Scored queries, whose metrics are means over the queries of every group.

    Attributes:
        queries: [Q] their ids.
        scores: {measure: [Q] float64}.
        domains: [Q] names, or ``None``.
        fingerprint: of the data; the order of queries, documents and judgements is not in it.
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
        """The same scores, by the queries' ids in the order of `other`'s queries."""
        place = {query: row for row, query in enumerate(self.queries)}
        rows = np.array([place[query] for query in other.queries])
        scores = {name: values[rows] for name, values in self.scores.items()}
        return QueryItems(other.queries, scores, other.domains, self.fingerprint)

    def resampled(self, rows: NDArray[np.int64]) -> Metrics:
        """The means of resamples: queries [R, Q] -> [R] each."""
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
    """Search the corpus exactly, by cosine, and score each query's hits.

    Args:
        model: anything with ``encode``, see `moe_fast.evaluation.embed`.
        retrieval: corpus, queries and qrels, see `moe_fast.data.read_retrieval`.
        measures: ``"nDCG@k"``, ``"MRR@k"``, ``"Recall@k"``, ``"MAP@k"``, ``"MAP"``.
        ignore_identical_ids: leave out of a query's hits the document with its own id, as BEIR and
            MTEB do (in ArguAna and Quora the queries are documents).
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
    """Finds the best documents for each query, by an exact search with the cosine.

    Args:
        model: anything with ``encode``; its ``encode_query`` and ``encode_document``, where it has
            them, unless ``encode.roles`` says otherwise.
        retrieval: corpus and queries.
        depth: documents per query; all where there are fewer.
        ignore_identical_ids: leave out the document with the query's own id, as BEIR does.
        encode: how texts are encoded.

    Returns:
        {query: {document: score}}, best first. Cosines equal to the last bit are ranked in the
        corpus's order, and the later one is given the next smaller float32, so that every program
        that sorts by score ranks the same.

    Raises:
        ValueError: no queries or no corpus, depth below 1, domains that the model does not know, or
            as `moe_fast.evaluation.embed`.
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
    """`retrieve`, and the settings of the encoding."""
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
    """The first hits but the query's own document."""
    return dict([hit for hit in hits.items() if hit[0] != query][:depth])


def _check_domains(model: Any, retrieval: Retrieval) -> None:
    """Raise before anything is encoded where a text's domain is none of the model's."""
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
    ignore_identical_ids: bool = True,
    name: str = "run",
    bootstrap: Bootstrap | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score a run, such as one that another program wrote (`read_run`).

    Args:
        run: {query: {document: score}}; a query that it lacks scores 0.
        retrieval: queries, qrels and, where known, the queries' domains.
        measures, ignore_identical_ids: see `evaluate_retrieval`.
        name: of the run in the result.
        bootstrap: settings of the intervals.
        settings: what else to say in the result about how the run was made.

    Returns:
        An `Evaluation`: means over the judged queries, by ir-measures (nDCG is trec_eval's, with
        linear gains), per domain where the queries have domains, and over all. As in BEIR and
        trec_eval, a query without judgements is not scored, and one whose judgements are all 0 or
        less scores 0. Details: the numbers of queries (scored), of those without a relevant
        document and, over all, of queries without judgements and of those whose own document
        is in the corpus and ignored.

    Raises:
        ValueError: an unknown measure; no query with a relevant document; qrels of unknown
            documents or queries; a run with queries or documents that are not in `retrieval`.
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
    """Say how many queries are not scored, or cannot score."""
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
    """Of everything but the order."""
    parts = (retrieval.queries, retrieval.qrels, retrieval.domains or {})
    return fingerprint(
        *(sorted((key, _sorted(value)) for key, value in part.items()) for part in parts),
        sorted(retrieval.corpus),
        ignore_identical_ids,
    )


def _sorted(value: Any) -> Any:
    return sorted(value.items()) if isinstance(value, Mapping) else value


def check_qrels(retrieval: Retrieval) -> None:
    """Raises for judgements that cannot be scored; call it before anything is encoded.

    Raises:
        ValueError: no query with a relevant document, judgements of an unknown query or document,
            or a query without a domain where others have one.
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
