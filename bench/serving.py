"""A server under load: ``moe-fast serve`` beside a plain handler that calls ``encode``.

    python -m bench.serving MODEL -o serving.json
    python -m bench.serving MODEL --clients 64 --seconds 60 --odd -o load.json

Both servers serve the same mixture, in a process of their own on loopback, with the same number of
threads; the clients are coroutines of this process, which keep their connections. Every vector is
compared with that of a direct ``encode``. The plain handler is :mod:`bench.plain_server`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_fast.inference import load_model

from .embedding import read_pairs
from .harness import ROOT, environment, write_json

OURS, PLAIN = "moe-fast serve", "plain handler"
TOLERANCE = 1e-3  # of float32 vectors of length 1
_READY = re.compile(r"http://127\.0\.0\.1:(\d+)")


@dataclass
class Load:
    """What the clients of one run saw.

    Attributes:
        server: its name.
        texts: what kind of texts.
        clients, seconds: how many clients asked, and for how long.
        requests: answered requests; ``per_second`` of them.
        milliseconds: latency at 50, 95 and 99 %.
        wrong: vectors that differ from a direct ``encode``.
        errors: answers with another status than 200, by status.
        memory: the server's resident bytes before, after a tenth of the time, and at the end.
        padding_avoided: tokens of padding that batches would have had, over real tokens.
    """

    server: str
    texts: str
    clients: int
    seconds: float
    requests: int = 0
    per_second: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=dict)
    wrong: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    memory: list[int] = field(default_factory=list)
    padding_avoided: float | None = None


@dataclass(frozen=True)
class Question:
    """A request, and the vectors it must get."""

    texts: list[str]
    domains: list[str]
    vectors: NDArray[np.float32]

    def body(self, model: str) -> bytes:
        """The request's JSON."""
        content = {
            "model": model,
            "input": self.texts,
            "domain": self.domains,
            "encoding_format": "base64",
        }
        return json.dumps(content).encode()


def questions_of(model: Any, kind: str, count: int, seed: int = 0) -> list[Question]:
    """Requests of one text each (``short``: 16 tokens, ``long``: as MedQuAD's answers), or ``odd``.

    Half of the odd ones have up to 9 texts of any length.
    """
    draw = random.Random(seed)
    pairs = read_pairs(count)
    questions = [" ".join(a.split()[:12]) for a, _ in pairs]
    answers = [b for _, b in pairs]
    domains = list(model.transformers_model.config.domains)
    requests: list[list[str]] = []
    for short, long in zip(questions, answers, strict=True):
        if kind == "odd" and draw.random() < 0.5:
            number = draw.randint(1, 9)
            requests.append([_piece(draw, draw.choice(answers)) for _ in range(number)])
        else:
            requests.append([long if kind == "long" else short])
    named = [[draw.choice(domains) for _ in texts] for texts in requests]
    flat = [text for texts in requests for text in texts]
    vectors = model.encode(flat, domain=[d for row in named for d in row], truncate=True)
    ends = np.cumsum([len(texts) for texts in requests])[:-1]
    parts = np.split(np.asarray(vectors, np.float32), ends)
    return [Question(*row) for row in zip(requests, named, parts, strict=True)]


def _piece(draw: random.Random, text: str) -> str:
    words = text.split()
    return " ".join(words[: draw.randint(1, max(1, len(words)))])


# --- the servers ---------------------------------------------------------------------------------


@contextlib.contextmanager
def running(server: str, model: str, threads: int) -> Iterator[tuple[int, int]]:
    """Run a server of the model; yields its port and the id of its process."""
    command = [sys.executable, "-m", "moe_fast.cli", "serve", model, "--port", "0", "--truncate"]
    if server == PLAIN:
        command = [sys.executable, "-m", "bench.plain_server", model]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ports: list[int] = []
    ready = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            ports.extend(int(port) for port in _READY.findall(line))
            if "startup complete" in line:
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not ready.wait(180) or not ports or process.poll() is not None:
            raise RuntimeError(f"{server} did not start: {' '.join(command)}")
        yield ports[0], process.pid
    finally:
        process.terminate()
        process.wait(60)


# --- the clients ---------------------------------------------------------------------------------


async def ask(reader: Any, writer: Any, body: bytes) -> tuple[int, bytes]:
    """Send a request on an open connection; return the answer's status and body."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
    return int(answer.split()[1]), await reader.readexactly(length)


def are_right(answer: bytes, question: Question) -> int:
    """The number of vectors that differ from the question's."""
    rows = json.loads(answer)["data"]
    vectors = np.array([np.frombuffer(base64.b64decode(r["embedding"]), "<f4") for r in rows])
    if vectors.shape != question.vectors.shape:
        return len(question.texts)
    difference = np.abs(vectors - question.vectors).max(axis=1)
    return int((~(difference <= TOLERANCE)).sum())


async def press(load: Load, port: int, pid: int, questions: Sequence[Question], model: str) -> None:
    """Let the clients ask for the load's seconds, and note what they saw in it."""
    bodies = [question.body(model) for question in questions]
    times: list[float] = []
    end = time.perf_counter() + load.seconds

    async def client(number: int) -> None:
        draw = random.Random(number)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 26)
        while time.perf_counter() < end:
            i = draw.randrange(len(questions))
            started = time.perf_counter()
            status, answer = await ask(reader, writer, bodies[i])
            times.append(time.perf_counter() - started)
            if status == 200:
                load.wrong += are_right(answer, questions[i])
            else:
                load.errors[str(status)] = load.errors.get(str(status), 0) + 1
        writer.close()

    async def watch() -> None:
        load.memory.append(resident(pid))
        await asyncio.sleep(load.seconds / 10)
        load.memory.append(resident(pid))

    started = time.perf_counter()
    await asyncio.gather(watch(), *(client(i) for i in range(load.clients)))
    load.memory.append(resident(pid))
    load.requests = len(times)
    load.per_second = len(times) / (time.perf_counter() - started)
    load.milliseconds = {
        f"p{p}": round(1e3 * float(np.percentile(times, p)), 2) for p in (50, 95, 99)
    }


def resident(pid: int) -> int:
    """The resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no VmRSS.")


def padding_avoided(port: int) -> float:
    """Tokens of padding left out, over those computed, from the server's metrics."""
    import urllib.request

    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    value = {
        line.split()[0]: float(line.split()[1]) for line in page.splitlines() if line[0] != "#"
    }
    return value["moe_fast_padding_tokens_avoided_total"] / value["moe_fast_tokens_total"]


def direct_milliseconds(model: Any, questions: Sequence[Question], seconds: float) -> float:
    """The median time of a direct ``encode`` of one request."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        question = questions[len(times) % len(questions)]
        started = time.perf_counter()
        model.encode(question.texts, domain=question.domains, truncate=True)
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a mixture with domains")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--kinds", default="short,long", help="of texts: short, long, odd")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--texts", type=int, default=500, help="different requests")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only-ours", action="store_true")
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model)
    name = Path(arguments.model).name
    kinds = arguments.kinds.split(",")
    asked = {kind: questions_of(model, kind, arguments.texts) for kind in kinds}
    loads: list[Load] = []
    direct = direct_milliseconds(model, asked[kinds[0]], min(arguments.seconds, 5.0))
    for server in (OURS,) if arguments.only_ours else (OURS, PLAIN):
        with running(server, arguments.model, arguments.threads) as (port, pid):
            for kind in kinds:
                runs = [arguments.clients] if kind != kinds[0] else [1, arguments.clients]
                for clients in runs:
                    seconds = arguments.seconds if clients > 1 else arguments.seconds / 3
                    load = Load(server, kind, clients, seconds)
                    asyncio.run(press(load, port, pid, asked[kind], name))
                    if server == OURS:
                        load.padding_avoided = padding_avoided(port)
                    loads.append(load)
                    print(load, flush=True)
    print(f"direct encode of one request: {direct:.2f} ms")
    if arguments.output is not None:
        record = {
            "environment": environment(threads=arguments.threads, model=name),
            "direct_encode_milliseconds": direct,
            "loads": [asdict(load) for load in loads],
        }
        write_json(arguments.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
