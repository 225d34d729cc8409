"""Reads retrieval sets: documents, queries, and judgements of which documents answer a query."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from moe_fast.data import checks
from moe_fast.data.file_formats import unique_keys
from moe_fast.data.layouts import Files, corpus_files, find_files
from moe_fast.data.lines import open_binary
from moe_fast.data.qrels import Qrels, check_relevance, read_qrels
from moe_fast.data.records import Drops, Texts, read_records
from moe_fast.messages import reason, shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retrieval:
    """A retrieval set, in which every query has judgements and every id in them exists.

    Attributes:
        corpus: {document id: text}.
        queries: {query id: text}.
        qrels: {query id: {document id: relevance}}. A relevance above 0 means relevant; every query
            has a relevant document.
        domains: {query id: domain} of all queries, or None.
        corpus_domains: {document id: domain} of all documents, or None.
        dropped: {kind: how many were left out} with ``on_missing="drop"``. The kinds are
            ``documents``, ``texts of queries``, ``queries`` and ``judgements``.
    """

    corpus: Texts
    queries: Texts
    qrels: Qrels
    domains: Texts | None = None
    corpus_domains: Texts | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)


def read_retrieval(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    on_missing: Literal["error", "drop"] = "error",
) -> Retrieval:
    """Read a retrieval set, and check that documents, queries and judgements fit together.

    Args:
        path: a folder in BEIR's layout: ``corpus.jsonl`` (``_id`` or ``id``, ``text``, optional
            ``title`` and ``domain``), ``queries.jsonl`` (``_id`` or ``id``, ``text``, optional
            ``domain``), either also as ``.gz``, and ``qrels/{split}.tsv`` (query id, document id,
            whole-number relevance; a header line or none; or TREC's four columns). Or a folder in
            MIRACL's or MLDR's layout, see :mod:`moe_fast.data.layouts`. Or one ``.json`` or
            ``.json.gz`` file
            ``{"corpus": {id: text}, "queries": {id: text}, "qrels": {id: {id: relevance}}}``,
            optionally with ``"domains"`` and ``"corpus_domains"`` ``{id: domain}``.
            Ids are strings or whole numbers; 7 and "7" are the same id.
        split: the name of a file in the folder's ``qrels``, without ``.tsv``; by default the only
            file, or ``test`` if there are several.
        on_missing: what to do if judgements name a document or query that does not exist or has no
            text, which occurs in some published sets. ``"error"`` raises. ``"drop"`` leaves out
            these judgements, empty texts, and queries that then have no relevant document; a
            warning says how many.

    Returns:
        The retrieval set. A document's title is put before its text with a space between, as BEIR
        does. Queries of a folder without judgements in the split are left out.

    Raises:
        FileNotFoundError: the folder, or a file that it must have, does not exist.
        ValueError: `on_missing` is neither ``"error"`` nor ``"drop"``.
        ValueError: the path is of no supported format, or `split` is given for a file.
        ValueError: the split does not exist, or there are several qrels files, none of them
            ``test``, and no `split`.
        ValueError: a file is broken or truncated, or a line is not UTF-8 or cannot be parsed.
        ValueError: an id is given twice; the error names both lines.
        ValueError: a text is empty.
        ValueError: only some rows have a domain.
        ValueError: judgements name unknown documents or queries; the error says how many, and
            names some.
        ValueError: a query has no relevant document.
        ValueError: a relevance is no whole number or beyond a million, or a pair is judged twice.
    """
    drops = _new_drops(on_missing)
    path = Path(path)
    if path.is_dir():
        read = _read_files(find_files(path, split), drops)
    elif not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    elif not path.name.lower().endswith((".json", ".json.gz")):
        raise ValueError(
            f"path={str(path)!r}: expected a folder in BEIR's layout, a .json or a .json.gz file"
        )
    elif split is not None:
        raise ValueError(f"split={split!r}: {path} is one file, which has no splits")
    else:
        read = _read_json(path, drops)
    return _with_dropped(read, drops, path)


def read_retrieval_files(
    corpus: str | os.PathLike[str],
    queries: str | os.PathLike[str],
    qrels: str | os.PathLike[str],
    *,
    on_missing: Literal["error", "drop"] = "error",
) -> Retrieval:
    """Read a retrieval set whose files are in different places.

    Args:
        corpus: a ``.jsonl`` file, or a folder with ``docs-*.jsonl`` (``.gz``), as MIRACL's corpora.
        queries: a ``.jsonl`` file, or a ``.tsv`` file of two cells (id, text) without a header.
        qrels: the judgements, see :func:`moe_fast.data.read_qrels`.
        on_missing: as in :func:`read_retrieval`.

    Returns, raises:
        As :func:`read_retrieval`. The names that columns may have are in
        :mod:`moe_fast.data.records`.
    """
    drops = _new_drops(on_missing)
    files = Files(corpus_files(Path(corpus)), Path(queries), Path(qrels))
    return _with_dropped(_read_files(files, drops), drops, files.qrels)


def _new_drops(on_missing: str) -> Drops:
    if on_missing not in ("error", "drop"):
        raise ValueError(f"on_missing must be 'error' or 'drop'; got {on_missing!r}")
    return Counter() if on_missing == "drop" else None


def _with_dropped(read: Retrieval, drops: Drops, path: Path) -> Retrieval:
    """Add the numbers of what was left out, and say them."""
    dropped = {kind: count for kind, count in sorted((drops or {}).items()) if count}
    if dropped:
        said = ", ".join(f"{count:,} {kind}" for kind, count in dropped.items())
        logger.warning("%s: left out, as on_missing='drop' asks: %s", path, said)
    return replace(read, dropped=dropped)


def _judged(qrels: Qrels, corpus: Texts, queries: Texts, drops: Drops) -> Qrels:
    """Remove and count the judgements to drop; all judgements stay if `drops` is None.

    What stays are judgements whose document and query exist, of queries with a relevant document.
    """
    if drops is None:
        return qrels
    kept: Qrels = {}
    for query, row in qrels.items():
        known = {document: r for document, r in row.items() if document in corpus}
        if query in queries and any(r > 0 for r in known.values()):
            kept[query] = known
        else:
            drops["queries"] += 1
        drops["judgements"] += len(row) - len(kept.get(query, ()))
    return kept


def _read_files(files: Files, drops: Drops) -> Retrieval:
    corpus, corpus_domains = read_records(files.corpus, "documents", drops)
    queries, domains = read_records([files.queries], "texts of queries", drops)
    qrels = _judged(read_qrels(files.qrels), corpus, queries, drops)
    _check_qrels(qrels, corpus, queries, str(files.qrels))
    judged = {query: text for query, text in queries.items() if query in qrels}
    if domains is not None:
        domains = {query: domains[query] for query in judged}
    return Retrieval(corpus, judged, {q: qrels[q] for q in judged}, domains, corpus_domains)


def _read_json(path: Path, drops: Drops) -> Retrieval:
    try:
        with open_binary(path) as file:
            data = json.load(file, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not readable as JSON ({reason(error)})") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(data).__name__}")
    checks.present(data, ("corpus", "queries", "qrels"), str(path))
    corpus = _strings(data["corpus"], f"{path}, corpus", "documents", drops)
    queries = _strings(data["queries"], f"{path}, queries", "texts of queries", drops)
    qrels = _judged(_relevances(data["qrels"], f"{path}, qrels"), corpus, queries, drops)
    _check_qrels(qrels, corpus, queries, f"{path}, qrels")
    if drops is not None:
        judged = {query: text for query, text in queries.items() if query in qrels}
        drops["texts of queries"] += len(queries) - len(judged)
        queries = judged
    _check_same("queries", queries, "qrels", qrels, str(path))
    domains: dict[str, Texts | None] = {}
    for name, owners in (("domains", queries), ("corpus_domains", corpus)):
        domains[name] = None
        if data.get(name) is not None:
            read = _strings(data[name], f"{path}, {name}")
            if drops is not None:
                read = {key: domain for key, domain in read.items() if key in owners}
            _check_same("texts", owners, name, read, str(path))
            domains[name] = read
    return Retrieval(corpus, queries, qrels, domains["domains"], domains["corpus_domains"])


def _strings(values: Any, where: str, kind: str = "", drops: Drops = None) -> Texts:
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{where}: expected a JSON object {{id: text}} that is not empty")
    if drops is not None:
        full = {key: value for key, value in values.items() if value is not None and value != ""}
        drops[kind] += len(values) - len(full)
        values = full
    return {key: checks.text(value, shown(key), where) for key, value in values.items()}


def _relevances(values: Any, where: str) -> Qrels:
    if not isinstance(values, dict) or not all(isinstance(row, dict) for row in values.values()):
        raise ValueError(
            f"{where}: expected a JSON object {{query id: {{document id: relevance}}}}"
        )
    for query, row in values.items():
        for document, relevance in row.items():
            check_relevance(
                relevance, f"{where}, query {shown(query)} and document {shown(document)}"
            )
    return values


def _check_qrels(qrels: Qrels, corpus: Texts, queries: Texts, where: str) -> None:
    if not qrels:
        raise ValueError(f"{where}: no judgements")
    documents = dict.fromkeys(document for row in qrels.values() for document in row)
    for kind, named, known in (("queries", qrels, queries), ("documents", documents, corpus)):
        if unknown := [key for key in named if key not in known]:
            raise ValueError(
                f"{where}: {len(unknown)} unknown {kind} are named: {_some(unknown)}; "
                "on_missing='drop' leaves out what names them"
            )
    empty = [query for query, row in qrels.items() if not any(r > 0 for r in row.values())]
    if empty:
        raise ValueError(f"{where}: {len(empty)} queries have no relevant document: {_some(empty)}")


def _check_same(
    first: str, left: Mapping[str, Any], second: str, right: Mapping[str, Any], where: str
) -> None:
    if different := left.keys() ^ right.keys():
        raise ValueError(
            f"{where}: {len(different)} ids are in only one of {first} and {second}: "
            f"{_some(sorted(different))}"
        )


def _some(names: Iterable[str]) -> str:
    names = [shown(name) for name in names]
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
