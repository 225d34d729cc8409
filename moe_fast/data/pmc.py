"""Searches PubMed Central, and reads abstracts and citations from its answers.

Formats: Entrez Programming Utilities Help (https://www.ncbi.nlm.nih.gov/books/NBK25499/) for
ESearch, EFetch and ELink.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from moe_fast.data.entrez import BadAnswer, EntrezClient, Refused, read_json, refuse_error
from moe_fast.extras import require
from moe_fast.messages import listed, shown

PAGE = 10_000  # ids per answer of ESearch, the most that it gives
CITES = "pmc_pmc_cites"  # the link from a paper to the papers of PubMed Central that it cites
_DATABASE = "pmc"
_FIELD = re.compile(r"\s*[A-Z]{2,4} *- ")  # how a Medline record begins
_LAST_FIELD = "SO"  # of a Medline record


@dataclass(frozen=True)
class History:
    """A search that the service keeps for some hours on its history server."""

    web_env: str
    query_key: str


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        count: the number of all papers found.
        ids: the ids of the papers, without "PMC"; all or as many as were asked for.
        history: where the service keeps the search.
    """

    count: int
    ids: list[str]
    history: History


def mesh_query(term: str) -> str:
    """Return the query for papers with a MeSH term.

    Raises:
        ValueError: the term is empty, or has characters of the query language.
    """
    if not term.strip() or re.search(r'["\[\]#\x00-\x1f]', term):
        raise ValueError(
            f"query: a MeSH term is a text without quotes, brackets and #; got {shown(term)}"
        )
    return f'"{term.strip()}"[MeSH Terms]'


def search(
    client: EntrezClient, query: str, dates: tuple[str, str] | None, most: int | None
) -> Found:
    """Search PubMed Central.

    Args:
        client: sends the requests.
        query: the query in Entrez's language.
        dates: the first and last date of publication, each as YYYY/MM/DD, YYYY/MM or YYYY.
        most: the largest number of ids; ``None``: all.

    Raises:
        ValueError: a phrase of the query is unknown, or nothing is found.
        ServiceError: see `EntrezClient.ask`.
    """
    limits = {} if dates is None else dict(zip(("mindate", "maxdate"), dates, strict=True))
    if limits:
        limits["datetype"] = "pdat"
    common = {"db": _DATABASE, "retmode": "json"}
    size = PAGE if most is None else min(PAGE, most)
    first = client.ask(
        "esearch",
        partial(_read_search, start=0, size=size),
        **common,
        **limits,
        term=query,
        usehistory="y",
        retmax=size,
    )
    if not first.count:
        between = f" from {dates[0]} to {dates[1]}" if dates else ""
        raise ValueError(f"query: PubMed Central has no papers for {query}{between}")
    ids, wanted = list(first.ids), first.count if most is None else min(most, first.count)
    while len(ids) < wanted:  # of the stored search, which new papers do not change
        size = min(PAGE, wanted - len(ids))
        page = client.ask(
            "esearch",
            partial(_read_search, start=len(ids), size=size, count=first.count),
            **common,
            term=f"#{first.history.query_key}",
            WebEnv=first.history.web_env,
            usehistory="y",
            retstart=len(ids),
            retmax=size,
        )
        ids += page.ids
    if len(set(ids)) < len(ids):
        raise Refused(f"esearch gave ids twice for {query}")
    return Found(first.count, ids, first.history)


def _read_search(text: str, start: int, size: int, count: int | None = None) -> Found:
    """Read a page of `size` ids; `count` is the number found according to the first page."""
    result = read_json(text).get("esearchresult")
    if not isinstance(result, dict):
        raise BadAnswer(f"an answer without esearchresult: {shown(text)}")
    refuse_error(result)
    for kind in ("errorlist", "warninglist"):
        for name, phrases in (result.get(kind) or {}).items():
            if phrases and name in ("phrasesnotfound", "fieldsnotfound", "quotedphrasesnotfound"):
                raise ValueError(f"query: PubMed Central does not know {listed(phrases)}")
    try:
        found, ids = int(result["count"]), [_uid(i) for i in result["idlist"]]
        history = History(str(result["webenv"]), str(result["querykey"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer(f"an incomplete answer of esearch: {shown(result, 200)}") from error
    if count not in (None, found) or len(ids) != min(size, found - start):
        raise BadAnswer(f"{len(ids):,} ids from {start:,} on, out of {found:,}; asked for {size:,}")
    return Found(found, ids, history)


def abstracts(client: EntrezClient, ids: Sequence[str]) -> dict[str, str]:
    """Return {id: abstract} of the papers that the service has; "" for a paper without abstract.

    Papers that an answer lacks are asked for again together with one that it has. If only that one
    comes, the service lacks the others, and the answer was not cut short.

    Raises:
        ServiceError: see `EntrezClient.ask`.
    """
    return _with_missing(client, ids, _fetch(client, ids, {"id": ",".join(ids)}))


def abstracts_of_search(
    client: EntrezClient, ids: Sequence[str], history: History, start: int
) -> dict[str, str]:
    """Return the `abstracts` of a stored search's papers from number `start` on, which are `ids`.

    Raises:
        Refused: the service does not keep that search any more.
        ServiceError: see `EntrezClient.ask`.
    """
    stored = {"WebEnv": history.web_env, "query_key": history.query_key}
    found = _fetch(client, ids, {**stored, "retstart": start, "retmax": len(ids)})
    return _with_missing(client, ids, found)


def _with_missing(
    client: EntrezClient, ids: Sequence[str], found: dict[str, str]
) -> dict[str, str]:
    """Ask again for those of `ids` that are not found yet, until no more come."""
    while missing := [uid for uid in ids if uid not in found]:
        asked = [*missing, next(iter(found))]
        again = _fetch(client, asked, {"id": ",".join(asked)}, witness=asked[-1])
        if again.keys() <= found.keys():
            break
        found = found | again
    return found


def _fetch(
    client: EntrezClient,
    ids: Collection[str],
    which: dict[str, Any],
    witness: str | None = None,
) -> dict[str, str]:
    read = partial(_read_medline, asked=frozenset(ids), witness=witness)
    return client.ask("efetch", read, db=_DATABASE, rettype="medline", retmode="text", **which)


def _read_medline(text: str, asked: Collection[str], witness: str | None) -> dict[str, str]:
    """Read records in the Medline format; the one of the id `witness` must be among them."""
    if not _FIELD.match(text):
        raise BadAnswer(f"an answer that is no Medline record: {shown(text, 200)}")
    medline = require("Bio.Medline", "papers", "fetching papers")
    try:
        records = list(medline.parse(io.StringIO(text)))
    except LookupError as error:
        raise BadAnswer(f"an answer that is no Medline record: {shown(text, 200)}") from error
    if not text.endswith("\n") or _LAST_FIELD not in records[-1]:
        raise BadAnswer(f"an answer that ends within a record: ...{shown(text[-60:])}")
    found = {}
    for record in records:
        uid = str(record.get("PMC", "")).strip().removeprefix("PMC")
        if uid not in asked:
            raise BadAnswer(f"a record that was not asked for: PMC {shown(uid)}")
        found[uid] = " ".join(str(record.get("AB", "")).replace("\0", " ").split())
    if witness is not None and witness not in found:
        raise BadAnswer(f"an answer without the record of PMC{witness}")
    return found


def citations(client: EntrezClient, ids: Sequence[str]) -> dict[str, list[str]]:
    """Return {id: ids of the papers of PubMed Central that this paper cites}, sorted.

    The ids stand in the request, although the service may keep the search: of a stored search it
    gives the links of all papers together.

    Raises:
        ServiceError: see `EntrezClient.ask`.
    """
    return client.ask(
        "elink",
        partial(_read_links, asked=ids),
        dbfrom=_DATABASE,
        db=_DATABASE,
        linkname=CITES,
        cmd="neighbor",
        retmode="json",
        id=list(ids),
    )


def _read_links(text: str, asked: Sequence[str]) -> dict[str, list[str]]:
    answer = read_json(text)
    found: dict[str, list[str]] = {}
    try:
        for linked in answer["linksets"]:
            refuse_error(linked)
            (uid,) = map(_uid, linked["ids"])
            cited = {
                _uid(target)
                for links in linked.get("linksetdbs", ())
                if links["linkname"] == CITES
                for target in links["links"]
            }
            found[uid] = sorted(cited, key=int)
    except BadAnswer:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadAnswer(f"an answer of elink that cannot be read: {shown(text, 200)}") from error
    if found.keys() != set(asked):
        raise BadAnswer(f"links of {len(found):,} papers; asked for {len(asked):,}")
    return found


def _uid(value: Any) -> str:
    """Return an id as text; raise ValueError if it is none."""
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,18}", str(value)):
        raise ValueError(f"no id: {shown(value)}")
    return str(value)
