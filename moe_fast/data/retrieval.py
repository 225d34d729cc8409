"""Reads retrieval sets: documents, queries, and judgements of which documents answer a query."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from moe_fast.data import checks
from moe_fast.data.file_formats import read_rows, unique_keys
from moe_fast.data.lines import open_binary, read_lines
from moe_fast.messages import reason, shown

logger = logging.getLogger(__name__)
MAX_RELEVANCE = 1_000_000  # trec_eval's memory and time grow with the largest relevance

Texts = dict[str, str]
Qrels = dict[str, dict[str, int]]
Drops = Counter[str] | None  # {kind: number left out} with on_missing="drop"; None for "error"


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
            whole-number relevance; a header line or none). Or one ``.json`` or ``.json.gz`` file
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
    if on_missing not in ("error", "drop"):
        raise ValueError(f"on_missing must be 'error' or 'drop'; got {on_missing!r}")
    path = Path(path)
    drops: Drops = Counter() if on_missing == "drop" else None
    if path.is_dir():
        read = _read_folder(path, split, drops)
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


def _read_folder(folder: Path, split: str | None, drops: Drops) -> Retrieval:
    corpus_path, queries_path = _find(folder, "corpus.jsonl"), _find(folder, "queries.jsonl")
    qrels_path = _find_qrels(folder / "qrels", split)
    corpus, corpus_domains = _read_records(corpus_path, "documents", drops)
    queries, domains = _read_records(queries_path, "texts of queries", drops)
    qrels = _judged(_read_qrels(qrels_path), corpus, queries, drops)
    _check_qrels(qrels, corpus, queries, str(qrels_path))
    judged = {query: text for query, text in queries.items() if query in qrels}
    if domains is not None:
        domains = {query: domains[query] for query in judged}
    return Retrieval(corpus, judged, {q: qrels[q] for q in judged}, domains, corpus_domains)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(f"{folder}: no {name} or {name}.gz in this folder")


def _find_qrels(folder: Path, split: str | None) -> Path:
    present = sorted(path.stem for path in folder.glob("*.tsv"))
    if split is None:
        split = present[0] if len(present) == 1 else "test"
    if not present:
        raise FileNotFoundError(f"{folder}: no .tsv file in this folder")
    if split not in present:
        raise ValueError(f"split={split!r}: {folder} has judgements for {present}")
    return folder / f"{split}.tsv"


def _read_records(path: Path, kind: str, drops: Drops) -> tuple[Texts, Texts | None]:
    """Read {id: text} and {id: domain} (None without domains) of a corpus or queries file."""
    texts: Texts = {}
    domains: Texts = {}
    places: dict[str, str] = {}
    for where, row in read_rows(path):
        name = "id" if "id" in row and "_id" not in row else "_id"
        checks.present(row, (name, "text"), where)
        key = checks.identifier(row[name], name, where)
        if key in places:
            raise ValueError(f"{where}: {name} {shown(key)} was given before, {places[key]}")
        places[key] = where
        if drops is not None and not (row["text"] or row.get("title")):
            drops[kind] += 1
            continue
        texts[key] = _text(row, where)
        if row.get("domain") is not None:
            domains[key] = checks.text(row["domain"], "domain", where)
        if len(domains) not in (0, len(texts)):
            raise ValueError(f"{where}: domain must be in every row of the file or in none")
    if not texts:
        raise ValueError(f"{path}: no rows")
    return texts, domains or None


def _text(row: Mapping[str, Any], where: str) -> str:
    title = row.get("title") or ""
    if not title:
        return checks.text(row["text"], "text", where)
    title = checks.text(title, "title", where)
    if row["text"] == "":  # some documents of BEIR's sets consist of a title only
        return title
    return f"{title} {checks.text(row['text'], 'text', where)}"


def _read_qrels(path: Path) -> Qrels:
    qrels: Qrels = {}
    lines: dict[tuple[str, str], int] = {}
    for line, text in read_lines(path):
        where = f"{path}, line {line}"
        cells = text.rstrip("\r\n").split("\t")
        if not text.strip("\r\n ") or (line == 1 and cells[-1].strip() == "score"):
            continue
        if len(cells) != 3:
            raise ValueError(
                f"{where}: {len(cells)} cells between tabs; expected query id, document id, "
                "relevance"
            )
        query, document, relevance = cells
        whole = re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", relevance)  # int() would also accept 1_0
        value = _relevance(int(relevance) if whole else relevance, where)
        if (query, document) in lines:
            raise ValueError(
                f"{where}: query {shown(query)} and document {shown(document)} were judged before, "
                f"in line {lines[query, document]}"
            )
        lines[query, document] = line
        qrels.setdefault(query, {})[document] = value
    return qrels


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
            _relevance(relevance, f"{where}, query {shown(query)} and document {shown(document)}")
    return values


def _relevance(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_RELEVANCE:
        raise ValueError(
            f"{where}: relevance must be a whole number from {-MAX_RELEVANCE:,} to "
            f"{MAX_RELEVANCE:,}, got {shown(value)}"
        )
    return value


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
