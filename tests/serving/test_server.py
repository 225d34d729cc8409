"""``moe-fast serve`` as a process of its own: it answers, stops cleanly, and survives a kill."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A process, its port and what it has logged."""

    def __init__(self, *options):
        command = [sys.executable, str(ROOT / "moe_fast_cli.py"), "serve", "--port", "0", *options]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.log = []
        self.address = None
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._listening.wait(300), "".join(self.log)

    def _read(self):
        for line in self.process.stdout:
            self.log.append(line)
            found = re.search(r"http://(127\.0\.0\.1:\d+)", line)
            if found:
                self.address = found[1]
                self._listening.set()
        self._listening.set()

    def ask(self, texts):
        connection = http.client.HTTPConnection(self.address, timeout=300)
        body = {"model": "enforced", "input": texts, "domain": "law"}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/embeddings", body=json.dumps(body), headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def test_it_answers_and_ends_at_sigterm_with_what_it_took(models):
    with Server(str(models / "enforced"), "--max-batch-tokens", "32") as server:
        status, _ = server.ask("w1")
        assert status == 200
        answers = []
        many = threading.Thread(target=lambda: answers.append(server.ask(["w1 " * 20] * 500)))
        many.start()
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        many.join()
        assert server.process.wait(60) in (0, -signal.SIGTERM)
    ((status, answer),) = answers
    assert status == 200
    assert len(answer["data"]) == 500


def test_a_port_in_use_is_an_error(models):
    with Server(str(models / "enforced")) as server:
        port = server.address.split(":")[1]
        command = [sys.executable, str(ROOT / "moe_fast_cli.py"), "serve", str(models / "enforced")]
        done = subprocess.run(
            [*command, "--port", port], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr


@pytest.mark.slow
def test_a_killed_worker_is_replaced_while_the_others_serve(models):
    with Server(str(models / "enforced"), "--workers", "2") as server:
        until = time.monotonic() + 300
        workers = []
        while len(workers) < 2 and time.monotonic() < until:
            workers = re.findall(r"Started server process \[(\d+)\]", "".join(server.log))
            time.sleep(0.1)
        assert server.ask("w1")[0] == 200
        os.kill(int(workers[0]), signal.SIGKILL)
        answered = 0
        while len(workers) < 3 and time.monotonic() < until:
            # One that talked to the killed worker gets no answer.
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                answered += server.ask("w1 w2")[0] == 200
            workers = re.findall(r"Started server process \[(\d+)\]", "".join(server.log))
        assert len(workers) == 3
        assert answered
        assert server.ask("w1")[0] == 200
