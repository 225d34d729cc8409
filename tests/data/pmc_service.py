"""A service on the loopback address that answers as Entrez does, with papers of our own making.

The forms of the answers follow NCBI's documentation; they were not recorded from the live service.
"""

from __future__ import annotations

import json
import random
import textwrap
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

HOST = "eutils.ncbi.nlm.nih.gov"
KEY = "secret-key-of-a-user"


@dataclass
class Reply:
    """What is sent; with ``announced`` the header says so many bytes, whatever the body has."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    announced: int | None = None


@dataclass
class Request:
    number: int
    utility: str
    parameters: dict[str, list[str]]

    def one(self, name: str) -> str | None:
        return (self.parameters.get(name) or [None])[0]

    @property
    def identity(self) -> str:
        return f"{self.utility} {sorted(self.parameters.items())}"


def json_reply(content: Any, **more: Any) -> Reply:
    return Reply(json.dumps(content).encode(), **more)


@dataclass
class Service:
    """Papers by MeSH term, and a fault to commit.

    Attributes:
        fault: takes a request and its right reply; returns the reply that is sent instead.
        dead: ids that searches find and that have no record.
    """

    terms: dict[str, list[str]]
    abstracts: dict[str, str | None]
    cites: dict[str, list[str]]
    fault: Callable[[Request, Reply], Reply] = lambda request, reply: reply
    dead: frozenset[str] = frozenset()
    requests: list[Request] = field(default_factory=list)
    history: dict[str, list[str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, utility: str, parameters: dict[str, list[str]]) -> Reply:
        with self.lock:
            request = Request(len(self.requests), utility, parameters)
            self.requests.append(request)
            reply = getattr(self, utility)(request)
        return self.fault(request, reply)

    def esearch(self, request: Request) -> Reply:
        term = request.one("term") or ""
        if term.startswith("#"):
            ids = self.history[f"{request.one('WebEnv')}{term}"]
        else:
            name = term.removesuffix("[MeSH Terms]").strip('"')
            if name not in self.terms:
                lists = {"errorlist": {"phrasesnotfound": [term], "fieldsnotfound": []}}
                empty = {"count": "0", "idlist": [], "webenv": "x", "querykey": "1"}
                return json_reply({"esearchresult": {**empty, **lists}})
            ids = self.terms[name]
            if request.one("mindate"):
                assert request.one("datetype") == "pdat" and request.one("maxdate")
        web_env, key = f"MCID_{len(self.history)}", "1"
        if request.one("usehistory") == "y":
            self.history[f"{web_env}#{key}"] = list(ids)
        start, size = int(request.one("retstart") or 0), int(request.one("retmax") or 20)
        result = {
            "count": str(len(ids)),
            "retmax": str(size),
            "retstart": str(start),
            "querykey": key,
            "webenv": web_env,
            "idlist": ids[start : start + size],
            "translationset": [],
        }
        return json_reply({"header": {"type": "esearch"}, "esearchresult": result})

    def efetch(self, request: Request) -> Reply:
        assert request.one("rettype") == "medline" and request.one("retmode") == "text"
        if request.one("WebEnv"):
            ids = self.history.get(f"{request.one('WebEnv')}#{request.one('query_key')}")
            if ids is None:
                return Reply(b"<eFetchResult><ERROR>Unable to obtain query</ERROR>", status=400)
            start, size = int(request.one("retstart") or 0), int(request.one("retmax") or 20)
            ids = ids[start : start + size]
        else:
            ids = (request.one("id") or "").split(",")
        records = [self.record(uid) for uid in ids if uid not in self.dead]
        return Reply("\n".join(["", *records, ""]).encode(), kind="text/plain")

    def record(self, uid: str) -> str:
        fields = [f"PMC - PMC{uid}", f"PMID- {uid}9", f"TI  - Title of {uid}"]
        if self.abstracts[uid] is not None:
            text = textwrap.wrap(self.abstracts[uid] or "", 80)
            fields.append("AB  - " + "\n      ".join(text))
        fields += ["FAU - Müller, Änne", f"SO  - J Tests. 2020;1:{uid}."]
        return "\n".join(fields) + "\n"

    def elink(self, request: Request) -> Reply:
        assert request.one("dbfrom") == request.one("db") == "pmc"
        assert request.one("linkname") == "pmc_pmc_cites"
        sets = []
        for uid in request.parameters["id"]:
            linked: dict[str, Any] = {"dbfrom": "pmc", "ids": [uid]}
            if self.cites.get(uid):
                links = {"dbto": "pmc", "linkname": "pmc_pmc_cites", "links": self.cites[uid]}
                linked["linksetdbs"] = [links]
            sets.append(linked)
        return json_reply({"header": {"type": "elink"}, "linksets": sets})


def make_service(size: int = 12, seed: int = 0) -> Service:
    """Two MeSH terms of `size` papers each, two in both; each paper cites some earlier ones."""
    rng = random.Random(seed)
    ids = [str(1000 + i) for i in range(2 * size - 2)]
    abstracts: dict[str, str | None] = {
        uid: " ".join(f"w{rng.randrange(500)}" for _ in range(40)) + f" of {uid} – µ" for uid in ids
    }
    abstracts[ids[3]] = None
    cites = {
        uid: [*rng.sample(ids[:i], min(i, 5)), "77"]  # 77 is in no search
        for i, uid in enumerate(ids)
        if i % 4
    }
    terms = {"Breast Neoplasms": ids[:size], "Heart Failure": ids[size - 2 :]}
    return Service(terms, abstracts, cites)


@contextmanager
def serve(service: Service) -> Iterator[int]:
    """Answer on a free port of the loopback address within the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(urlsplit(self.path).query)

        def do_POST(self) -> None:
            self._reply(self.rfile.read(int(self.headers["Content-Length"])).decode())

        def _reply(self, query: str) -> None:
            assert self.headers["Host"] == HOST
            utility = urlsplit(self.path).path.rsplit("/", 1)[1].removesuffix(".fcgi")
            reply = service.answer(utility, parse_qs(query))
            self.close_connection = True
            try:
                self.send_response(reply.status)
                size = len(reply.body) if reply.announced is None else reply.announced
                headers = {"Content-Type": reply.kind, "Content-Length": str(size)}
                for name, value in (headers | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)
            except OSError:  # the client was killed
                pass

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class _ToLoopback(urllib.request.HTTPSHandler):
    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def https_open(self, req: Any) -> Any:
        assert req.host == HOST
        req.host = f"127.0.0.1:{self.port}"
        return self.do_open(HTTPConnection, req)


class _NoHttp(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        raise AssertionError(f"a test asks for {req.full_url}")


def redirect(port: int) -> None:
    """Let urllib's opener, which Biopython uses, open Entrez on the loopback address alone."""
    handlers = (urllib.request.ProxyHandler({}), _ToLoopback(port), _NoHttp())
    urllib.request.install_opener(urllib.request.build_opener(*handlers))


class Clock(SimpleNamespace):
    """Stands for the module ``time``: nothing waits, and the moments of requests are known."""

    def __init__(self) -> None:
        super().__init__(now=1e9, waits=[])

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds
        self.waits.append(seconds)


@contextmanager
def loopback(service: Service, monkeypatch: Any) -> Iterator[Clock]:
    """Serve, redirect this process to it, and let nothing wait."""
    from Bio import Entrez

    clock = Clock()
    monkeypatch.setattr(Entrez, "time", clock)
    monkeypatch.setattr(Entrez._open, "previous", 0.0)
    with serve(service) as port:
        redirect(port)
        try:
            yield clock
        finally:
            urllib.request.install_opener(None)  # type: ignore[arg-type]
