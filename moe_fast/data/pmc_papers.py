"""Fetches papers of PubMed Central into a file that `read_papers` reads, and can be interrupted.

Every answer is stored in ``OUTPUT.parts`` as soon as it is read. The same call later goes on from
there, sends no request again whose answer is stored, and gives the same file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from moe_fast.data import checks
from moe_fast.data.entrez import EntrezClient, Refused, ServiceError
from moe_fast.data.file_formats import file_format
from moe_fast.data.pmc import (
    History,
    abstracts,
    abstracts_of_search,
    citations,
    mesh_query,
    search,
)
from moe_fast.data.write import LIST_FORMATS, write_papers
from moe_fast.files import PARTIAL, check_output, exclusive, write_text
from moe_fast.messages import shown

logger = logging.getLogger(__name__)

BATCH = 200  # papers per request
_REQUEST, _FINISHED = "request", "finished"
_KIND = "moe_fast papers, unfinished"
_OURS = re.compile(
    rf"({_REQUEST}|{_FINISHED}|(search|abstracts|citations)-[\d-]+)\.json"
    rf"|\..+\.[0-9a-f]{{8}}{re.escape(PARTIAL)}\.json"
)


@dataclass
class FetchedDomain:
    """How many papers of a domain were found, and what became of them.

    Attributes:
        found: the papers that the search found.
        not_asked: those beyond ``max_papers``.
        in_other: those that belong to an earlier domain.
        missing: those that the service found but does not have.
        no_abstract: those without an abstract.
        papers: those in the file.
    """

    found: int = 0
    not_asked: int = 0
    in_other: int = 0
    missing: int = 0
    no_abstract: int = 0
    papers: int = 0


def fetch_papers(
    queries: Mapping[str, str],
    output: str | os.PathLike[str],
    client: EntrezClient,
    *,
    from_date: str | None = None,
    to_date: str | None = None,
    max_papers: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    finish: Callable[[], None] | None = None,
) -> dict[str, FetchedDomain]:
    """Fetch the abstracts of papers of PubMed Central, and which papers they cite.

    A paper that several queries find belongs to the first domain. Papers without an abstract are
    left out. A file has the columns of `read_papers`: ``id``, ``abstract``, ``citing``, ``domain``.

    Args:
        queries: {domain: MeSH term}.
        output: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file.
        client: sends the requests.
        from_date, to_date: the first and last date of publication, as YYYY, YYYY-MM or YYYY-MM-DD.
        max_papers: the largest number of papers per domain, the first that the service names.
        overwrite: replace an existing `output`, and discard what an interrupted call with other
            arguments has left.
        progress: show a progress bar.
        finish: called right before the file gets its name.

    Returns:
        {domain: the counts of its papers}.

    Raises:
        ValueError: an argument is invalid, a MeSH term is unknown, or a domain has no papers.
        FileExistsError: `output` exists, or an interrupted call with other arguments was there.
        RuntimeError: the service failed again and again, or another run is writing `output`.
        ImportError: biopython is not installed.
    """
    output = Path(output)
    file_format(output, LIST_FORMATS)
    terms = {checks.text(name, "domain", "query"): mesh_query(t) for name, t in queries.items()}
    if not terms:
        raise ValueError("query: give at least one domain and its MeSH term")
    if max_papers is not None and max_papers < 1:
        raise ValueError(f"max_papers must be at least 1; got {max_papers}")
    dates = _dates(from_date, to_date)
    parts = _Parts(output.with_name(f"{output.name}.parts"))
    request = {"queries": list(terms.items()), "dates": dates, "max_papers": max_papers}
    # After its last request, a killed call may have written the output.
    check_output(output, overwrite or parts.holds(_FINISHED))
    with exclusive(output):
        parts.open({"kind": _KIND, **json.loads(json.dumps(request)), "batch": BATCH}, overwrite)
        fetching = _Fetching(client, parts, terms, dates, max_papers)
        fetching.run(progress)
        report = fetching.report()
        if not any(domain.papers for domain in report.values()):
            parts.remove()
            raise ValueError("query: none of the papers found has an abstract")
        if finish is not None:
            finish()
        parts.put(_FINISHED, True)
        write_papers(fetching.rows(), output)
        parts.remove()
    return report


@dataclass
class _Fetching:
    client: EntrezClient
    parts: _Parts
    terms: dict[str, str]
    dates: tuple[str, str] | None
    max_papers: int | None
    counts: list[int] = field(default_factory=list)  # of each domain's search
    ids: list[list[str]] = field(default_factory=list)  # of each domain
    histories: list[History | None] = field(default_factory=list)  # of searches of this call
    done: int = 0  # papers

    def run(self, progress: bool) -> None:
        """Fetch everything that is not stored yet."""
        try:
            for number, query in enumerate(self.terms.values()):
                self._search(number, query)
            total = sum(map(len, self.ids))
            with tqdm(total=total, unit=" papers", desc="papers", disable=not progress) as bar:
                for domain, start, wanted in self._batches():
                    self._fetch(domain, start, wanted)
                    size = len(self.ids[domain][start : start + BATCH])
                    self.done += size
                    bar.update(size)
        except ServiceError as error:
            raise type(error)(f"{error}. {self._how_far()}") from error

    def _how_far(self) -> str:
        if len(self.ids) < len(self.terms):
            far = f"{len(self.ids)} of {len(self.terms)} searches are done"
        else:
            far = f"{self.done:,} of {sum(map(len, self.ids)):,} papers are done"
        return f"{far} and kept in {self.parts.folder}; the same command goes on from there"

    def _search(self, number: int, query: str) -> None:
        name, history = f"search-{number}", None
        stored = self.parts.get(name)
        if stored is None:
            found = search(self.client, query, self.dates, self.max_papers)
            stored, history = {"count": found.count, "ids": found.ids}, found.history
            self.parts.put(name, stored)
        self.counts.append(stored["count"])
        self.ids.append(stored["ids"])
        self.histories.append(history)

    def _batches(self) -> Iterator[tuple[int, int, list[str]]]:
        """Yield (domain, number of its first paper, ids without those of earlier domains)."""
        seen: set[str] = set()
        for domain, ids in enumerate(self.ids):
            for start in range(0, len(ids), BATCH):
                yield domain, start, [i for i in ids[start : start + BATCH] if i not in seen]
            seen.update(ids)

    def _fetch(self, domain: int, start: int, wanted: list[str]) -> None:
        """Fetch what is not stored yet of a batch of papers."""
        place = f"{domain}-{start}"
        texts = self.parts.get(f"abstracts-{place}")
        if texts is None:
            texts = self._abstracts(domain, start, wanted) if wanted else {}
            self.parts.put(f"abstracts-{place}", texts)
        if not self.parts.holds(f"citations-{place}"):
            kept = [uid for uid in wanted if texts.get(uid)]
            self.parts.put(f"citations-{place}", citations(self.client, kept) if kept else {})

    def _abstracts(self, domain: int, start: int, wanted: list[str]) -> dict[str, str]:
        history = self.histories[domain]
        if history is not None and wanted == self.ids[domain][start : start + BATCH]:
            try:
                return abstracts_of_search(self.client, wanted, history, start)
            except Refused as error:
                logger.warning("the stored search cannot be used, ids are sent instead: %s", error)
                self.histories[domain] = None
        return abstracts(self.client, wanted)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the papers of the file from the stored answers."""
        names = list(self.terms)
        for domain, start, wanted in self._batches():
            texts = self.parts.get(f"abstracts-{domain}-{start}")
            cited = self.parts.get(f"citations-{domain}-{start}")
            for uid in wanted:
                if texts.get(uid):
                    yield {
                        "id": f"PMC{uid}",
                        "abstract": texts[uid],
                        "citing": [f"PMC{other}" for other in cited[uid]],
                        "domain": names[domain],
                    }

    def report(self) -> dict[str, FetchedDomain]:
        """Count the papers of each domain."""
        counts = [
            FetchedDomain(found=count, not_asked=count - len(ids), in_other=len(ids))
            for count, ids in zip(self.counts, self.ids, strict=True)
        ]
        for domain, start, wanted in self._batches():
            texts = self.parts.get(f"abstracts-{domain}-{start}")
            count = counts[domain]
            count.in_other -= len(wanted)
            count.missing += sum(uid not in texts for uid in wanted)
            count.no_abstract += sum(texts.get(uid) == "" for uid in wanted)
            count.papers += sum(bool(texts.get(uid)) for uid in wanted)
        return dict(zip(self.terms, counts, strict=True))


@dataclass(frozen=True)
class _Parts:
    """The folder of the stored answers, each a JSON file that is written whole or not at all."""

    folder: Path

    def open(self, request: dict[str, Any], overwrite: bool) -> None:
        """Create the folder, or go on with it if it belongs to the same request.

        Raises:
            FileExistsError: it belongs to another request, unless `overwrite`, or is not ours.
        """
        others = self._others()
        before = self.get(_REQUEST)
        ours = isinstance(before, dict) and before.get("kind") == _KIND
        if others or (before is not None and not ours):
            raise FileExistsError(
                f"{self.folder} is where unfinished papers are kept, and holds something else "
                f"({', '.join(map(shown, others[:3])) or 'request.json'}). Move it away, or choose "
                "another output."
            )
        if ours and before != request and not overwrite:
            raise FileExistsError(
                f"{self.folder} holds the papers of an interrupted run with other queries, dates "
                "or max_papers. Run with the same settings to go on with it, or with overwrite "
                "(--overwrite) to discard it."
            )
        if before != request:
            self.remove()
            self.put(_REQUEST, request)

    def holds(self, name: str) -> bool:
        """Return whether a part is there and readable."""
        return self.get(name) is not None

    def get(self, name: str) -> Any:
        """Return a part; None if it is missing or damaged, as by a power cut."""
        try:
            return json.loads(self._path(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def put(self, name: str, value: Any) -> None:
        """Store a part."""
        write_text(self._path(name), json.dumps(value))

    def remove(self) -> None:
        """Delete our files, the request last, and the folder if it is then empty."""
        if self.folder.is_dir():
            for entry in sorted(os.listdir(self.folder)):
                if _OURS.fullmatch(entry) and entry != self._path(_REQUEST).name:
                    (self.folder / entry).unlink(missing_ok=True)
            self._path(_REQUEST).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in it
                self.folder.rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _others(self) -> list[str]:
        if not os.path.lexists(self.folder):
            return []
        if self.folder.is_symlink() or not self.folder.is_dir():
            return [self.folder.name]
        return sorted(entry for entry in os.listdir(self.folder) if not _OURS.fullmatch(entry))


def _dates(first: str | None, last: str | None) -> tuple[str, str] | None:
    """Return the two dates in the service's form; it takes both or none.

    Raises:
        ValueError: a date is none, or the first is after the last.
    """
    if first is None and last is None:
        return None
    begin = _date("from_date", first or "1800", ends=False)
    end = _date("to_date", last or "3000", ends=True)
    if begin > end:
        raise ValueError(f"from_date {first} is after to_date {last}")
    return (first or "1800").replace("-", "/"), (last or "3000").replace("-", "/")


def _date(name: str, text: str, ends: bool) -> tuple[int, int, int]:
    """Return (year, month, day) of the first day of a year, month or day; its last if it `ends`."""
    try:
        if not re.fullmatch(r"[0-9]{4}(-[0-9]{2}){0,2}", text):
            raise ValueError
        year, *rest = map(int, text.split("-"))
        date(year, *rest, *[1] * (2 - len(rest)))
    except ValueError:
        raise ValueError(f"{name} must be YYYY, YYYY-MM or YYYY-MM-DD; got {shown(text)}") from None
    month, day = [*rest, *((12, 31) if ends else (1, 1))[len(rest) :]]
    return year, month, day
