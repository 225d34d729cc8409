"""Papers from PubMed Central: the file, what interrupts it, and an unreliable service."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

pytest.importorskip("Bio", reason="needs the extra moe-fast[papers]")
pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from moe_fast.data import EntrezClient, FetchedDomain, cocitation_pairs, entrez, pmc, pmc_papers
from moe_fast.data.entrez import FIRST_PAUSE, TRIES, Refused, ServiceError
from moe_fast.data.papers import read_papers
from moe_fast.data.pmc_papers import fetch_papers
from tests.data.pmc_service import KEY, Reply, json_reply, loopback, make_service

QUERIES = {"cancer": "Breast Neoplasms", "heart": "Heart Failure"}


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(pmc_papers, "BATCH", 5)
    made = make_service()
    with loopback(made, monkeypatch) as clock:
        made.clock = clock
        yield made


def fetch(service, path, key=KEY, **more):
    client = EntrezClient("someone@example.org", key, service.clock.sleep)
    return fetch_papers(more.pop("queries", QUERIES), path, client, **more)


def expected(service):
    """The rows that should come out, from what the service was made of."""
    rows, seen = [], set()
    for domain, term in QUERIES.items():
        for uid in service.terms[term]:
            if uid not in seen and service.abstracts[uid] is not None and uid not in service.dead:
                cited = sorted(map(int, service.cites.get(uid, [])))
                row = {"id": f"PMC{uid}", "abstract": service.abstracts[uid]}
                row |= {"citing": [f"PMC{c}" for c in cited], "domain": domain}
                rows.append(row)
            seen.add(uid)
    return rows


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_file(service, tmp_path):
    path = tmp_path / "papers.jsonl"
    report = fetch(service, path, from_date="2020", to_date="2021-06")
    assert lines(path) == expected(service)
    assert report == {
        "cancer": FetchedDomain(found=12, no_abstract=1, papers=11),
        "heart": FetchedDomain(found=12, in_other=2, papers=10),
    }
    assert list(tmp_path.iterdir()) == [path]
    for request in service.requests:
        assert request.parameters["tool"] == ["moe_fast"]
        assert request.parameters["email"] == ["someone@example.org"]
        assert request.parameters["api_key"] == [KEY]
    searches = [r for r in service.requests if r.utility == "esearch"]
    assert [r.one("mindate") for r in searches] == ["2020"] * 2
    assert [r.one("maxdate") for r in searches] == ["2021/06"] * 2
    stored = [r.one("WebEnv") is not None for r in service.requests if r.utility == "efetch"]
    assert stored == [True] * 3 + [False] + [True] * 2  # two papers of heart are in cancer


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_cocite_reads_it(name, service, tmp_path):
    fetch(service, tmp_path / name)
    papers = read_papers(tmp_path / name)
    rows = expected(service)
    assert papers.ids == [row["id"] for row in rows]
    assert set(papers.domains) == {"cancer", "heart"}
    known = set(papers.ids)
    links = {(row["id"], c) for row in rows for c in row["citing"] if c in known}
    found = papers.citations.tocoo()
    assert links == {(papers.ids[i], papers.ids[j]) for i, j in zip(*found.coords, strict=True)}
    pairs = cocitation_pairs(tmp_path / name, fractions=(1, 0, 0), seed=0)
    assert len(pairs.splits["train"]) > 0


def test_large_searches_come_in_pages(service, tmp_path, monkeypatch):
    monkeypatch.setattr(pmc, "PAGE", 5)
    fetch(service, tmp_path / "x.jsonl")
    assert lines(tmp_path / "x.jsonl") == expected(service)
    pages = [r for r in service.requests if r.utility == "esearch"]
    assert [r.one("retstart") for r in pages] == [None, "5", "10"] * 2
    assert all(r.one("term") == "#1" and r.one("WebEnv") for r in pages if r.one("retstart"))


def test_no_more_papers_than_asked_for(service, tmp_path):
    report = fetch(service, tmp_path / "x.jsonl", max_papers=4)
    assert report["cancer"] == FetchedDomain(found=12, not_asked=8, no_abstract=1, papers=3)
    wanted = ["1000", "1001", "1002", "1010", "1011", "1012", "1013"]
    assert [row["id"] for row in lines(tmp_path / "x.jsonl")] == [f"PMC{i}" for i in wanted]


# --- interruptions ---------------------------------------------------------------------------


def test_interrupted_at_any_request(service, tmp_path):
    """Stopped before each request in turn, then run again: the same bytes, nothing asked twice."""
    fetch(service, tmp_path / "whole.jsonl", max_papers=6)
    whole, count = (tmp_path / "whole.jsonl").read_bytes(), len(service.requests)
    for stop in range(count):
        service.requests.clear()

        def interrupt(seconds):
            raise KeyboardInterrupt

        def fault(request, reply, stop=stop):
            return Reply(b"", status=500) if request.number == stop else reply

        service.fault = fault
        client = EntrezClient("someone@example.org", KEY, interrupt)  # at its first error
        path = tmp_path / f"{stop}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            fetch_papers(QUERIES, path, client, max_papers=6)
        assert not path.exists()
        fetch(service, path, max_papers=6)
        assert path.read_bytes() == whole
        assert len(service.requests) == count + 1  # the one that failed
        assert not path.with_name(f"{path.name}.parts").exists()


def test_killed_before_the_answers_are_removed(service, tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    remove = pmc_papers._Parts.remove

    def die(self):
        if self.holds("finished"):
            raise KeyboardInterrupt
        remove(self)

    monkeypatch.setattr(pmc_papers._Parts, "remove", die)
    with pytest.raises(KeyboardInterrupt):
        fetch(service, path)
    whole, asked = path.read_bytes(), len(service.requests)
    monkeypatch.setattr(pmc_papers._Parts, "remove", remove)
    fetch(service, path)
    assert path.read_bytes() == whole and len(service.requests) == asked
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="exists already"):
        fetch(service, path)


def fail_after(service, count):
    service.requests.clear()
    service.fault = lambda request, reply: (
        Reply(b"down", status=503) if request.number >= count else reply
    )


def test_damaged_answers_are_fetched_again(service, tmp_path):
    fetch(service, tmp_path / "whole.jsonl")
    fail_after(service, 5)
    with pytest.raises(ServiceError):
        fetch(service, tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl.parts" / "citations-0-0.json").write_text('{"1001": ["10')
    service.fault = lambda request, reply: reply
    fetch(service, tmp_path / "x.jsonl")
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_what_another_run_left_is_kept(service, tmp_path):
    path = tmp_path / "x.jsonl"
    fail_after(service, 5)
    with pytest.raises(ServiceError):
        fetch(service, path)
    service.fault = lambda request, reply: reply
    with pytest.raises(FileExistsError, match="interrupted run with other queries, dates"):
        fetch(service, path, from_date="2020")
    fetch(service, path, from_date="2020", overwrite=True)
    assert lines(path) == expected(service)
    path.with_name("y.jsonl.parts").mkdir()
    path.with_name("y.jsonl.parts").joinpath("mine.txt").write_text("the only copy")
    with pytest.raises(FileExistsError, match="holds something else .*mine.txt"):
        fetch(service, tmp_path / "y.jsonl", overwrite=True)
    assert (tmp_path / "y.jsonl.parts" / "mine.txt").exists()


# --- an unreliable service ----------------------------------------------------------------------

BOMB = b'<?xml version="1.0"?><!DOCTYPE x SYSTEM "http://example.org/x.dtd" [<!ENTITY a "aaaa">'
BOMB += b'<!ENTITY b "&a;&a;&a;">]><eFetchResult><ERROR>&b;</ERROR></eFetchResult>'


def half(reply):
    return reply.body[: len(reply.body) * 2 // 3]


FAULTS = {
    "429": lambda reply: json_reply({"error": "API rate limit exceeded"}, status=429),
    "500": lambda reply: Reply(b"<html>Internal error</html>", status=500, kind="text/html"),
    "half, and cut": lambda reply: Reply(half(reply), kind=reply.kind, announced=len(reply.body)),
    "half, as if whole": lambda reply: Reply(half(reply), kind=reply.kind),
    "nothing": lambda reply: Reply(b"", kind=reply.kind),
    "no header": lambda reply: Reply(b"", kind=reply.kind, announced=10),
    "an error in a 200": lambda reply: json_reply({"error": "Search backend failed"}),
    "XML with entities and a DTD": lambda reply: Reply(BOMB, kind="text/xml"),
    "not UTF-8": lambda reply: Reply(reply.body.replace(b"1", b"\xff"), kind=reply.kind),
    "another answer": lambda reply: Reply(b"PMC - PMC5\nAB  - x\nSO  - y\n", kind="text/plain"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_every_request(name, service, tmp_path):
    """Each request fails once, and nothing is lost."""
    failed = set()

    def fault(request, reply):
        if request.identity in failed:
            return reply
        failed.add(request.identity)
        return FAULTS[name](reply)

    service.fault = fault
    fetch(service, tmp_path / "x.jsonl")
    assert lines(tmp_path / "x.jsonl") == expected(service)
    # A cut between two records looks whole; then the missing ones alone are asked for.
    asked = Counter(request.identity for request in service.requests)
    assert max(asked.values()) == 2 and asked.keys() == failed


def test_errors_within_answers(service, tmp_path):
    """As ESearch and ELink report them, in a part of a whole answer."""

    def fault(request, reply):
        if request.identity in failed or request.utility == "efetch":
            return reply
        failed.add(request.identity)
        if request.utility == "esearch":
            return json_reply({"esearchresult": {"ERROR": "Search Backend failed"}})
        answer = json.loads(reply.body)
        answer["linksets"][-1] = {**answer["linksets"][-1], "ERROR": "cannot be linked"}
        return json_reply(answer)

    failed = set()
    service.fault = fault
    fetch(service, tmp_path / "x.jsonl")
    assert lines(tmp_path / "x.jsonl") == expected(service)
    assert {identity.split()[0] for identity in failed} == {"esearch", "elink"}


@pytest.mark.parametrize("utility", ["esearch", "efetch", "elink"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays(name, utility, service, tmp_path):
    """Bounded tries, an error that says how far it came, and the same call goes on."""
    path = tmp_path / "x.jsonl"

    def fault(request, reply):
        return FAULTS[name](reply) if request.utility == utility else reply

    service.fault = fault
    with pytest.raises(ServiceError) as raised:
        fetch(service, path)
    message = str(raised.value)
    done = "0 of 2 searches are done" if utility == "esearch" else "0 of 24 papers are done"
    assert f"{utility} failed {TRIES} times, the last time with: " in message
    assert message.endswith(f"{done} and kept in {path}.parts; the same command goes on from there")
    assert len(message) < 700 and KEY not in message
    assert not path.exists()
    pauses = [seconds for seconds in service.clock.waits if seconds >= FIRST_PAUSE]
    rounds = 2 if utility == "efetch" and isinstance(raised.value, Refused) else 1  # then by ids
    assert pauses == [FIRST_PAUSE * 2**i for i in range(TRIES - 1)] * rounds
    service.fault = lambda request, reply: reply
    fetch(service, path)
    assert lines(path) == expected(service)


@pytest.mark.parametrize("times", [1, 1000])
def test_records_that_an_answer_lacks_are_asked_for_again(times, service, tmp_path):
    """Cut between two records, an answer looks whole."""

    def fault(request, reply):
        body = reply.body.rstrip(b"\n")
        if request.utility == "efetch" and b"\n\n" in body and len(cut) < times:
            cut.append(request.number)
            return Reply(body[: body.rindex(b"\n\n") + 1], kind="text/plain")
        return reply

    cut = []
    service.fault = fault
    if times > 1:  # the last record is always cut off, and no answer proves to be whole
        with pytest.raises(ServiceError, match="without the record of PMC1000"):
            fetch(service, tmp_path / "x.jsonl")
        service.fault = lambda request, reply: reply
    fetch(service, tmp_path / "x.jsonl")
    assert cut and lines(tmp_path / "x.jsonl") == expected(service)


def test_papers_without_record(service, tmp_path):
    service.dead = frozenset({"1001", "1004", "1013"})
    report = fetch(service, tmp_path / "x.jsonl")
    assert (report["cancer"].missing, report["heart"].missing) == (2, 1)
    assert lines(tmp_path / "x.jsonl") == expected(service)


def test_a_search_that_is_not_kept(service, tmp_path, caplog):
    def fault(request, reply):
        service.history.clear()
        return Reply(b"Unable to obtain query", status=400) if request.one("WebEnv") else reply

    service.fault = fault
    fetch(service, tmp_path / "x.jsonl")
    assert lines(tmp_path / "x.jsonl") == expected(service)
    assert "ids are sent instead: efetch was refused: HTTP status 400 (Unable" in caplog.text


def test_the_service_says_how_long_to_wait(service, tmp_path):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=100))
    answers = [Reply(b"", 429, {"Retry-After": "37"}), Reply(b"", 503, {"Retry-After": later})]
    answers.append(Reply(b"", 429, {"Retry-After": "soon"}))
    service.fault = lambda request, reply: answers.pop(0) if answers else reply
    fetch(service, tmp_path / "x.jsonl")
    first, second, third = [s for s in service.clock.waits if s >= FIRST_PAUSE]
    assert first == 37 and 80 < second <= 100 and third == 4 * FIRST_PAUSE
    service.fault = lambda request, reply: Reply(b"", 429, {"Retry-After": "86400"})
    with pytest.raises(ServiceError, match="asks to wait for 86,400 s"):
        fetch(service, tmp_path / "y.jsonl")
    assert len([s for s in service.clock.waits if s >= FIRST_PAUSE]) == 3


@pytest.mark.parametrize(("key", "least"), [(None, 1 / 3), (KEY, 1 / 10)])
def test_no_faster_than_allowed(key, least, service, tmp_path):
    moments = []

    def fault(request, reply):
        moments.append(service.clock.now)
        return reply

    service.fault = fault
    fetch(service, tmp_path / "x.jsonl", key)
    gaps = [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]
    assert len(gaps) > 10 and min(gaps) > least - 1e-6


def test_a_silent_server(service, tmp_path, monkeypatch):
    monkeypatch.setattr(entrez, "TIMEOUT", 0.1)
    end = threading.Event()
    service.fault = lambda request, reply: reply if request.number else [end.wait(5), reply][1]
    fetch(service, tmp_path / "x.jsonl")
    end.set()
    assert lines(tmp_path / "x.jsonl") == expected(service)


def test_an_endless_answer(service, tmp_path, monkeypatch):
    monkeypatch.setattr(entrez, "MAX_BYTES", 100)
    with pytest.raises(Refused, match="an answer of more than 100 bytes"):
        fetch(service, tmp_path / "x.jsonl")


def test_the_key_is_in_no_message(service, tmp_path):
    service.fault = lambda request, reply: json_reply(
        {"error": "API key invalid", "api-key": KEY}, status=400
    )
    with pytest.raises(Refused, match="API key invalid") as raised:
        fetch(service, tmp_path / "x.jsonl")
    assert KEY not in str(raised.value) and len(service.requests) == 1
    assert KEY not in repr(EntrezClient("a@b", KEY))


def test_settings_of_biopython_and_sockets_are_as_before(service, tmp_path):
    import socket

    from Bio import Entrez

    before = Entrez.max_tries, Entrez.email, Entrez.api_key, Entrez.tool
    fetch(service, tmp_path / "x.jsonl")
    assert (Entrez.max_tries, Entrez.email, Entrez.api_key, Entrez.tool) == before
    assert socket.getdefaulttimeout() is None


# --- mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"queries": {}}, "give at least one domain"),
        ({"queries": {" ": "Heart Failure"}}, "domain is empty"),
        ({"queries": {"a": 'x" OR "y'}}, "without quotes, brackets"),
        ({"queries": {"a": ""}}, "a MeSH term is a text"),
        ({"queries": {"a": "Hart Failure"}}, r"does not know .*Hart Failure"),
        ({"from_date": "2020/01"}, "from_date must be YYYY, YYYY-MM or YYYY-MM-DD; got '2020/01'"),
        ({"to_date": "2020-02-30"}, "to_date must be"),
        ({"from_date": "2021-02", "to_date": "2021-01-31"}, "is after to_date"),
        ({"max_papers": 0}, "max_papers must be at least 1; got 0"),
    ],
)
def test_mistakes(more, message, service, tmp_path):
    with pytest.raises(ValueError, match=message):
        fetch(service, tmp_path / "x.jsonl", **more)
    assert not (tmp_path / "x.jsonl").exists()
    assert len(service.requests) <= 1


def test_dates_may_name_the_same_month(service, tmp_path):
    fetch(service, tmp_path / "x.jsonl", from_date="2021-02", to_date="2021-02")
    fetch(service, tmp_path / "y.jsonl", to_date="2021")
    assert service.requests[-1].one("mindate") is None
    assert [r.one("mindate") for r in service.requests if r.utility == "esearch"][-1] == "1800"


def test_nothing_found(service, tmp_path):
    service.terms["Heart Failure"] = []
    with pytest.raises(ValueError, match='no papers for "Heart Failure".*from 2020 to 3000'):
        fetch(service, tmp_path / "x.jsonl", from_date="2020")
    service.abstracts = dict.fromkeys(service.abstracts)
    with pytest.raises(ValueError, match="none of the papers found has an abstract"):
        fetch(service, tmp_path / "y.jsonl", queries={"cancer": "Breast Neoplasms"})


def test_other_formats_are_refused(service, tmp_path):
    with pytest.raises(ValueError, match=re.escape(".jsonl, .jsonl.gz, .parquet")):
        fetch(service, tmp_path / "x.csv")
    assert not service.requests
