"""``moe-fast serve`` as a process of its own: it answers, stops cleanly, and survives a kill."""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import threading
import time

import pytest

from tests.serving.process import COMMAND, ROOT, Server


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
        command = [*COMMAND, str(models / "enforced"), "--port", port]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
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
