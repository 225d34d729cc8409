"""Mines hard negatives: documents that rank high for a query but do not answer it.

Many of the highest-ranked documents answer the query although no label says so; such false
negatives harm training more than easy negatives do. A candidate is left out, and counted, for the
first of these reasons that holds:

    positive     it is a positive of the row, or of another row with the same query
    same_text    it has the text of the query
    group        it is a positive of a row of the same group (a topic, a source document)
    domain       its domain is not the query's, and `same_domain` is set
    no_query     it is no row's positive, and `known_queries` is set
    no_word      the ranking is BM25, and it shares no word with the query (an easy negative)
    margin       its score is above the limits that `max_ratio` and `margin` set

Texts that differ only in case and white space count as the same text.

The limit as a share of the positive's score is from Moreira et al. (NV-Retriever), arXiv
2407.15831, who find .95 best.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from moe_fast.data import checks
from moe_fast.data.columns import match_columns, numbered
from moe_fast.data.file_formats import Row
from moe_fast.data.mining_search import Found, search_vectors, search_words
from moe_fast.data.sources import DatasetSource
from moe_fast.encoding.domains import domains_of
from moe_fast.encoding.options import EncodeOptions
from moe_fast.encoding.vectors import embed
from moe_fast.messages import listed, shown
from moe_fast.ops.checks import check_count

BM25 = "bm25"
REASONS = ("positive", "same_text", "group", "domain", "no_query", "no_word", "margin")


@dataclass(frozen=True)
class MiningReport:
    """Counts of the negatives found and the candidates left out.

    Attributes:
        rows: rows in the result.
        documents: different texts that were searched.
        negatives: negatives in all rows together.
        short_rows: rows of the result with fewer negatives than asked for.
        lost_rows: rows without any negative, which are not in the result.
        left_out: {reason: number of candidates}, for the reasons in the module's docstring.
    """

    rows: int
    documents: int
    negatives: int
    short_rows: int
    lost_rows: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class MinedRows:
    """FlagEmbedding rows with mined negatives, and the counts of the mining."""

    rows: list[Row]
    report: MiningReport


@dataclass(frozen=True)
class MiningSettings:
    """Which candidates become negatives.

    Attributes:
        num_negatives: the largest number of negatives per row.
        depth: the number of highest-ranked documents per query that are considered. The query's
            positives do not count.
        skip: the number of highest-ranked documents, of these, to skip.
        max_ratio: leave out documents whose score exceeds this share of the best positive's score;
            ``None``: no limit. It is not applied if the best positive's score is 0 or less.
        margin: leave out documents whose score is not lower than the best positive's by at least
            this much; ``None``: no limit. The scores are cosines of a model, or those of BM25.
        group: the column whose equal values make rows a group; ``None``: no groups.
        same_domain: take only negatives of the query's own domain.
        known_queries: take only negatives that are some row's positive. The result then has
            ``neg_q``.
        sample: draw the negatives at random from the documents not left out, instead of taking the
            highest-ranked.
        seed: of the draws. The draw of a row depends on the seed and on the row alone.

    Raises:
        TypeError: `num_negatives`, `depth` or `skip` is not an int.
        ValueError: a value is out of range, or `skip` is not less than `depth`.
    """

    num_negatives: int = 7
    depth: int = 100
    skip: int = 0
    max_ratio: float | None = 0.95
    margin: float | None = None
    group: str | None = None
    same_domain: bool = False
    known_queries: bool = False
    sample: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("num_negatives", self.num_negatives)
        check_count("depth", self.depth)
        check_count("skip", self.skip, at_least=0)
        if self.skip >= self.depth:
            raise ValueError(f"skip must be less than depth = {self.depth}; got {self.skip}.")
        if self.max_ratio is not None and not 0 < self.max_ratio < math.inf:
            raise ValueError(f"max_ratio must be positive and finite; got {self.max_ratio!r}.")
        if self.margin is not None and not math.isfinite(self.margin):
            raise ValueError(f"margin must be finite; got {self.margin!r}.")


def mine_hard_negatives(
    rows: Iterable[Mapping[str, Any]],
    retriever: Any,
    *,
    settings: MiningSettings | None = None,
    corpus: Iterable[str] = (),
    encode_options: EncodeOptions | None = None,
) -> MinedRows:
    """Find each row's hard negatives among the positives of all rows, and in a corpus.

    Args:
        rows: pairs (``a``, ``b``) or FlagEmbedding rows (``query``, ``pos``, without negatives),
            also under the names in `moe_fast.data.columns.SPELLINGS`, with an optional ``domain``
            and the settings' ``group`` column. May be an iterator; it is consumed once.
        retriever: a model with ``encode``, whose cosines rank the documents, or ``"bm25"``. A
            mixture gets each text's domain if the rows have it.
        settings: see :class:`MiningSettings`; by default its defaults.
        corpus: extra candidate texts. They are assumed to answer none of the queries, and have no
            domain.
        encode_options: :class:`moe_fast.encoding.options.EncodeOptions`, used only with a model.

    Returns:
        Rows of ``query``, ``pos``, ``neg`` and, if given, ``domain`` and the group column. Rows
        without any negative are left out, and counted. If every negative chosen, in every row, is
        some row's positive (so none came from the corpus), the rows also have ``neg_q``: for each
        negative, the query it answers. If several rows have that positive, it is the query of the
        first.

    Raises:
        ValueError: there are no rows.
        ValueError: a row is no pair or FlagEmbedding row, or a value in it is invalid.
        ValueError: a row has negatives already, or the label 0.
        ValueError: a row lacks the group column, or ``domain`` with `same_domain`.
        ValueError: some rows have a ``domain`` and others none.
        ValueError: `retriever` is a string other than ``"bm25"``.
        ValueError: a corpus is given to a mixture that needs each text's domain.
        ValueError: no row has a negative left; the error has the counts.
        ImportError: faiss or bm25s is not installed.
    """
    settings = settings or MiningSettings()
    read = DatasetSource(rows, "rows").rows()  # replaces a dataset's class labels by their names
    asked = [_query_row(row, settings, f"row {n}") for n, (_, row) in enumerate(read, start=1)]
    if not asked:
        raise ValueError("rows is empty; there is nothing to mine for.")
    if len({"domain" in row for row in asked}) > 1:
        raise ValueError("column 'domain' must be in every row or in none; some rows lack it.")
    pool = _Pool.of(asked, corpus, settings.group)
    by_words = isinstance(retriever, str)
    found = _search(retriever, asked, pool, settings, encode_options)
    left_out: Counter[str] = Counter(dict.fromkeys(REASONS, 0))
    mined = [
        _with_negatives(row, number, pool, found, settings, left_out, by_words)
        for number, row in enumerate(asked)
    ]
    result = [row for row in mined if row["neg"]]
    report = MiningReport(
        rows=len(result),
        documents=len(pool.texts),
        negatives=sum(len(row["neg"]) for row in result),
        short_rows=sum(len(row["neg"]) < settings.num_negatives for row in result),
        lost_rows=len(mined) - len(result),
        left_out=dict(left_out),
    )
    if not result:
        raise ValueError(f"no row has a negative left; of the candidates were left out {left_out}.")
    if any(None in row["neg_q"] for row in result):
        for row in result:
            del row["neg_q"]
    return MinedRows(result, report)


def _query_row(row: Mapping[str, Any], settings: MiningSettings, where: str) -> Row:
    """Read ``query``, ``pos``, ``domain`` and the group column of a pair or FlagEmbedding row.

    Raises:
        ValueError: as `mine_hard_negatives` for the row.
    """
    found = match_columns(row, ("query", "pos", "domain", "label"), where=where)
    label = row.get(found.get("label", "label"))
    if label is not None and checks.label(label, "label", where) != 1:
        raise ValueError(f"{where}: label is {shown(label)}; only pairs that belong together.")
    if any(row[name] for name in row if numbered(name) is not None):
        raise ValueError(f"{where}: it has negatives already; remove that column to mine anew.")
    if not {"query", "pos"} <= found.keys():
        flag = "query" in row or "pos" in row
        checks.present(row, ("query", "pos") if flag else ("a", "b"), where)
    read: Row = {
        "query": checks.text(row[found["query"]], found["query"], where),
        "pos": checks.texts(row[found["pos"]], found["pos"], where),
    }
    if "domain" in found:
        read["domain"] = checks.text(row[found["domain"]], found["domain"], where)
    elif settings.same_domain:
        raise ValueError(
            f"{where}: same_domain needs a column 'domain'; it has {listed(sorted(row))}."
        )
    if settings.group is not None:
        checks.present(row, [settings.group], where)
        read[settings.group] = checks.scalar(row[settings.group], settings.group, where)
    return read


@dataclass
class _Pool:
    """All candidate documents, each text once, with what is known of each.

    Attributes:
        texts: each text as it was first written.
        domains: for each text, the domain of the first row that has it as a positive, or ``None``.
        queries: for each text, the query of that row; ``None`` for a text of the corpus.
        groups: for each text, the groups of all rows that have it as a positive.
        positives: for each row, the places of its positives in ``texts``.
        answers: {query as `plain` writes it: places of its positives in all rows}.
    """

    texts: list[str] = field(default_factory=list)
    domains: list[str | None] = field(default_factory=list)
    queries: list[str | None] = field(default_factory=list)
    groups: list[set[Any]] = field(default_factory=list)
    positives: list[list[int]] = field(default_factory=list)
    answers: dict[str, set[int]] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Sequence[Row], corpus: Iterable[str], group: str | None) -> _Pool:
        pool = cls()
        for row in rows:
            places = [pool._place(text, row["query"], row.get("domain")) for text in row["pos"]]
            pool.positives.append(places)
            pool.answers.setdefault(plain(row["query"]), set()).update(places)
            if group is not None:
                for place in places:
                    pool.groups[place].add(row[group])
        for number, text in enumerate(corpus, start=1):
            pool._place(checks.text(text, "text", f"corpus, text {number}"), None, None)
        return pool

    def _place(self, text: str, query: str | None, domain: str | None) -> int:
        place = self._places.setdefault(plain(text), len(self.texts))
        if place == len(self.texts):
            self.texts.append(text)
            self.domains.append(domain)
            self.queries.append(query)
            self.groups.append(set())
        return place


def plain(text: str) -> str:
    """Normalize a text, so that texts that differ only in case and white space become equal."""
    return " ".join(text.split()).casefold()


def _search(
    retriever: Any,
    rows: Sequence[Row],
    pool: _Pool,
    settings: MiningSettings,
    options: EncodeOptions | None,
) -> Found:
    """Find the best documents of every row's query.

    There are `depth` of them, and as many more as a query has positives at the most.
    """
    queries = [row["query"] for row in rows]
    k = settings.depth + max(map(len, pool.answers.values()))
    if isinstance(retriever, str):
        if retriever != BM25:
            raise ValueError(f"retriever must be a model or {BM25!r}; got {retriever!r}.")
        return search_words(queries, pool.texts, pool.positives, k)
    options = options or EncodeOptions()
    domains: Sequence[Any] | None = None
    if domains_of(retriever) and "domain" in rows[0] and options.domain is None:
        if None in pool.domains:
            raise ValueError(
                "the model wants each text's domain, which the texts of a corpus do not have: "
                "mine without a corpus, or give one domain for all in encode_options."
            )
        domains = pool.domains
    asked = [row["domain"] for row in rows] if domains is not None else None
    return search_vectors(
        embed(retriever, queries, "query", domains=asked, options=options),
        embed(retriever, pool.texts, "document", domains=domains, options=options),
        pool.positives,
        k,
    )


def _with_negatives(
    row: Row,
    number: int,
    pool: _Pool,
    found: Found,
    settings: MiningSettings,
    left_out: Counter[str],
    by_words: bool,
) -> Row:
    """Return the row with ``neg`` and ``neg_q``, and count the candidates left out.

    An entry of ``neg_q`` is ``None`` if the negative is no row's positive.
    """
    limit = _highest_score(float(found.positive_scores[number]), settings)
    answers = pool.answers[plain(row["query"])]
    candidates: list[int] = []
    looked_at = 0
    for place, score in zip(
        found.rows[number].tolist(), found.scores[number].tolist(), strict=True
    ):
        if place in answers:
            left_out["positive"] += 1
            continue
        looked_at += 1
        if looked_at > settings.depth:
            break
        if looked_at <= settings.skip:
            continue
        reason = _why_not(row, place, pool, settings)
        if reason is None and by_words and score <= 0:
            reason = "no_word"
        elif reason is None and score > limit:
            reason = "margin"
        if reason is not None:
            left_out[reason] += 1
            continue
        candidates.append(place)
        if len(candidates) == settings.num_negatives and not settings.sample:
            break
    if settings.sample and len(candidates) > settings.num_negatives:
        candidates = _random(row, settings.seed).sample(candidates, settings.num_negatives)
    negatives = {
        "neg": [pool.texts[place] for place in candidates],
        "neg_q": [pool.queries[place] for place in candidates],
    }
    kept = {name: value for name, value in row.items() if name not in ("query", "pos")}
    return {"query": row["query"], "pos": row["pos"], **negatives, **kept}


def _why_not(row: Row, place: int, pool: _Pool, settings: MiningSettings) -> str | None:
    """Return the reason, other than its score, to leave a candidate out, or ``None``."""
    if plain(pool.texts[place]) == plain(row["query"]):
        return "same_text"
    if settings.group is not None and row[settings.group] in pool.groups[place]:
        return "group"
    if settings.same_domain and pool.domains[place] != row["domain"]:
        return "domain"
    if settings.known_queries and pool.queries[place] is None:
        return "no_query"
    return None


def _highest_score(positive: float, settings: MiningSettings) -> float:
    """Return the highest score that a negative may have, given the best positive's score."""
    limit = math.inf
    if settings.max_ratio is not None and positive > 0:
        limit = settings.max_ratio * positive
    return limit if settings.margin is None else min(limit, positive - settings.margin)


def _random(row: Row, seed: int) -> random.Random:
    key = repr((seed, row["query"], row["pos"])).encode("utf-8", "surrogatepass")
    return random.Random(int.from_bytes(blake2b(key, digest_size=8).digest(), "little"))
