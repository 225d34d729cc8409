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
@pytest.mark.parametrize("stop", [0, 1, 2, 5, 9])
def test_a_killed_process_goes_on(stop, tmp_path):
    """Killed while it waits for the answer to a request; then the same command ends as usual."""
    service, reached, go = make_service(), threading.Event(), threading.Event()

    def fault(request, reply):
        if request.number == stop and not go.is_set():
            reached.set()
            go.wait(100)
        return reply

    service.fault = fault
    environment = os.environ | {"NCBI_API_KEY": KEY, "NCBI_EMAIL": "a@example.org"}
    environment["PYTHONPATH"] = str(ROOT)
    with serve(service) as port:
        line = [sys.executable, "-c", PROGRAM, str(port), "papers", *QUERIES, "-o", "x.jsonl"]
        process = subprocess.Popen([*line, "--quiet"], cwd=tmp_path, env=environment)
        assert reached.wait(100)
        process.send_signal(signal.SIGKILL)
        process.wait()
        go.set()
        assert not (tmp_path / "x.jsonl").exists()
        subprocess.run([*line, "--quiet"], cwd=tmp_path, env=environment, check=True)
        killed, asked = (tmp_path / "x.jsonl").read_bytes(), list(service.requests)
        assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "x.jsonl.yaml"}
        (tmp_path / "x.jsonl").unlink()
        service.requests.clear()
        subprocess.run([*line, "--quiet"], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "x.jsonl").read_bytes() == killed
    assert len(asked) == len(service.requests) + 1  # the one that was not answered
