"""papers: its options, its messages, and a process that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

pytest.importorskip("Bio", reason="needs the extra moe-fast[papers]")

from moe_fast.data import EntrezClient, fetch_papers, pmc_papers
from tests.data.pmc_service import KEY, Reply, loopback, make_service, serve

QUERIES = ["--query", "cancer=Breast Neoplasms", "--query", "heart=Heart Failure"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def service(monkeypatch):
    made = make_service()
    with loopback(made, monkeypatch):
        yield made


def test_papers_then_cocite(service, moe_fast_cli, workspace, monkeypatch):
    monkeypatch.setenv("NCBI_EMAIL", "someone@example.org")
    monkeypatch.setenv("NCBI_API_KEY", KEY)
    result = moe_fast_cli("papers", *QUERIES, "-o", "pmc.jsonl")
    assert result.exit_code == 0, result.output
    assert "cancer: 11 of 12 papers, 1 without abstract" in result.stdout
    assert "heart: 10 of 12 papers, 2 in an earlier domain" in result.stdout
    assert "pmc.jsonl: 21 papers" in result.stdout
    settings = (workspace / "pmc.jsonl.yaml").read_text()
    assert yaml.safe_load(settings)["query"] == QUERIES[1::2]
    assert "someone@example.org" not in settings and KEY not in settings
    assert service.requests[0].one("api_key") == KEY
    result = moe_fast_cli("cocite", "pmc.jsonl", "--fractions", "1,0,0", "-o", "pairs")
    assert result.exit_code == 0, result.output
    report = json.loads((workspace / "pairs" / "report.json").read_text())
    assert report["papers"] == 21 and (workspace / "pairs" / "train.jsonl").exists()


def test_the_key_may_be_in_a_file(service, moe_fast_cli, workspace):
    (workspace / "key").write_text(f"{KEY}\n")
    arguments = [*QUERIES, "--email", "a@example.org", "--api-key-file", "key"]
    assert moe_fast_cli("papers", *arguments, "-o", "x.jsonl", "--quiet").output == ""
    assert {request.one("api_key") for request in service.requests} == {KEY}
    (workspace / "key").write_text("\n")
    result = moe_fast_cli("papers", *arguments, "-o", "y.jsonl")
    assert result.exit_code == 1 and "--api-key-file key is empty" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*QUERIES, "-o", "x.jsonl"], "give your address by --email or NCBI_EMAIL"),
        ([*QUERIES, "-o", "x.csv"], "got .csv"),
        (["--query", "Heart Failure", "-o", "x.jsonl", "--email", "a@b"], "must be DOMAIN=TERM"),
        ([*QUERIES, *QUERIES, "-o", "x.jsonl", "--email", "a@b"], "'cancer' is there twice"),
    ],
)
def test_wrong_usage(arguments, message, service, moe_fast_cli, monkeypatch):
    monkeypatch.delenv("NCBI_EMAIL", raising=False)
    result = moe_fast_cli("papers", *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not service.requests


def test_a_failing_service_is_one_line(service, moe_fast_cli, workspace):
    service.fault = lambda request, reply: Reply(b"not for you", status=403)
    result = moe_fast_cli("papers", *QUERIES, "--email", "a@b", "-o", "x.jsonl")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "moe-fast papers: error: esearch was refused: HTTP status 403 (not for you). 0 of 2 "
        "searches are done and kept in x.jsonl.parts; the same command goes on from there\n"
    )
    assert [path.name for path in workspace.glob("*x.jsonl*")] == ["x.jsonl.parts"]


def test_biopython_is_missing(service, moe_fast_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "Bio.Entrez", None)
    result = moe_fast_cli("papers", *QUERIES, "--email", "a@b", "-o", "x.jsonl")
    assert result.exit_code == 1
    assert "fetching papers needs biopython, which" in result.stderr
    assert "'.[papers]'" in result.stderr


PROGRAM = """
import sys
from moe_fast.data import pmc_papers
from tests.data.pmc_service import redirect
from moe_fast.cli import main

redirect(int(sys.argv.pop(1)))
pmc_papers.BATCH = 5
sys.argv[0] = "moe-fast"
main()
"""


@pytest.mark.slow
def test_killed_processes_go_on(tmp_path, monkeypatch):
    """Killed three times while it waits for an answer, the same command ends as if undisturbed."""
    monkeypatch.setattr(pmc_papers, "BATCH", 5)
    whole = make_service()
    with loopback(whole, monkeypatch) as clock:
        client = EntrezClient("a@example.org", KEY, clock.sleep)
        queries = {"cancer": "Breast Neoplasms", "heart": "Heart Failure"}
        fetch_papers(queries, tmp_path / "whole.jsonl", client)

    service, stops = make_service(), [0, 4, 9]
    reached, go = threading.Event(), threading.Event()

    def fault(request, reply):
        if request.number in stops:
            stops.remove(request.number)
            reached.set()
            go.wait(200)
        return reply

    service.fault = fault
    place = tmp_path / "killed"
    place.mkdir()
    environment = os.environ | {"NCBI_API_KEY": KEY, "NCBI_EMAIL": "a@example.org"}
    environment["PYTHONPATH"] = str(ROOT)
    with serve(service) as port:
        line = [sys.executable, "-c", PROGRAM, str(port), "papers", *QUERIES, "-o", "x.jsonl"]
        while stops:
            process = subprocess.Popen([*line, "--quiet"], cwd=place, env=environment)
            assert reached.wait(200)
            reached.clear()
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert not (place / "x.jsonl").exists()
        go.set()
        subprocess.run([*line, "--quiet"], cwd=place, env=environment, check=True)
    assert (place / "x.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in place.iterdir()} == {"x.jsonl", "x.jsonl.yaml"}
    assert len(service.requests) == len(whole.requests) + 3  # those that were not answered
