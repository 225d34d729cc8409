"""A server under load: ``moe-fast serve`` beside a plain handler that calls ``encode``.

    python -m bench.serving -o serving.json
    python -m bench.serving --kinds odd --clients 64 --seconds 60 --trouble --workers 2 -o load.json
    python -m bench.serving --kinds short --requests 10000 --only-ours -o memory.json

The model is all-MiniLM-L6-v2 with five experts that differ, or the mixture in a given folder. Both
servers serve it in processes of their own on loopback, with the same number of threads in all; the
clients are coroutines of this process, which keep their connections. Every vector is compared with
that of a direct ``encode``. The plain handler is :mod:`bench.plain_server`.

``--trouble`` adds a client that never finishes its request, and one that sends garbage; with
``--workers`` of 2 or more it also kills one of our server's workers in the middle.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import moe_fast
from moe_fast.inference import load_model

from .embedding import pretrained, read_pairs
from .harness import ROOT, environment, write_json

OURS, PLAIN = "moe-fast serve", "plain handler"
TOLERANCE = 1e-3  # of float32 vectors of length 1
FIRST = 1000
"""After so many requests a server's memory should grow no further."""
_ADDRESS = re.compile(r"http://127\.0\.0\.1:([1-9]\d*)")
_WORKER = re.compile(r"Started server process \[(\d+)\]")
_HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


@dataclass
class Load:
    """What the clients of one run saw.

    Attributes:
        server: its name.
        texts: what kind of texts.
        clients, seconds: how many clients asked, and for how long.
        workers: the server's processes.
        requests: answered requests; ``per_second`` of them.
        milliseconds: latency at 50, 95 and 99 %.
        wrong: vectors that differ from a direct ``encode``.
        errors: answers with another status than 200, by status.
        lost: requests without an answer, for their connection ended.
        memory: the server's resident bytes before, after :data:`FIRST` requests, and at the end.
        troublemakers: what clients that hang or send garbage were answered, and how often.
        replaced_seconds: from the kill of a worker until another one served in its place.
        padding_avoided: tokens of padding that batches would have had, over real tokens.
    """

    server: str
    texts: str
    clients: int
    seconds: float
    workers: int = 1
    requests: int = 0
    per_second: float = 0.0
    milliseconds: dict[str, float] = field(default_factory=dict)
    wrong: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    memory: list[int] = field(default_factory=list)
    troublemakers: dict[str, int] = field(default_factory=dict)
    replaced_seconds: float | None = None
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


class Server:
    """A server of the model in processes of its own; it ends with the block.

    Args:
        name: :data:`OURS` or :data:`PLAIN`.
        model: the folder of the model.
        threads: of each process.
        workers: the number of processes; of ours alone.
    """

    def __init__(self, name: str, model: str, threads: int, workers: int = 1) -> None:
        options = ["--port", "0", "--truncate", "--workers", str(workers)]
        self.command = [sys.executable, "-m", "moe_fast.cli", "serve", model, *options]
        if name == PLAIN:
            self.command = [sys.executable, "-m", "bench.plain_server", model]
        self.workers = workers if name == OURS else 1
        self.log: list[str] = []
        self._ended = threading.Event()
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        self.log.extend(self.process.stdout or ())
        self._ended.set()

    @property
    def started(self) -> int:
        """How many processes have begun to serve so far."""
        return sum("startup complete" in line for line in self.log)

    @property
    def worker_pids(self) -> list[int]:
        """The processes that serve or have served, in the order of their start."""
        return [int(pid) for line in self.log for pid in _WORKER.findall(line)]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(next(port for line in self.log for port in _ADDRESS.findall(line)))

    def memory(self) -> int:
        """The resident bytes of its processes."""
        return sum(resident(pid) for pid in {self.process.pid, *self.worker_pids})

    def __enter__(self) -> Server:
        until = time.monotonic() + 180
        while self.started < self.workers:
            if time.monotonic() > until or self._ended.wait(0.05):
                self.__exit__()
                raise RuntimeError(f"{' '.join(self.command)} did not start: {''.join(self.log)}")
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        self.process.wait(60)


# --- the clients ---------------------------------------------------------------------------------


async def ask(reader: Any, writer: Any, body: bytes) -> tuple[int, bytes]:
    """Send a request on an open connection; return the answer's status and body."""
    writer.write(_HEAD % len(body) + body)
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


class Press:
    """The clients of one load.

    Args:
        load: where what they see is noted.
        server: whom they ask.
        questions: what they ask, drawn at random.
        model: the model's name.
        requests: the load ends after so many; ``None``: after the load's seconds.
        trouble: whether some clients hang and send garbage, and a worker is killed.
    """

    def __init__(
        self,
        load: Load,
        server: Server,
        questions: Sequence[Question],
        model: str,
        *,
        requests: int | None = None,
        trouble: bool = False,
    ) -> None:
        self.load, self.server, self.questions = load, server, questions
        self.bodies = [question.body(model) for question in questions]
        self.requests, self.trouble = requests, trouble
        self.times: list[float] = []
        self.strange: Counter[str] = Counter()

    async def run(self) -> None:
        """Let all clients ask until the end of the load."""
        load = self.load
        load.memory.append(self.server.memory())
        started = time.perf_counter()
        self.end = started + load.seconds
        tasks = [self.client(number) for number in range(load.clients)]
        if self.trouble:
            tasks += [self.hang(), self.send_garbage()]
            if load.workers > 1:
                tasks.append(self.kill_a_worker())
        await asyncio.gather(*tasks)
        load.seconds = time.perf_counter() - started
        load.memory.append(self.server.memory())
        load.requests = len(self.times)
        load.per_second = len(self.times) / load.seconds
        load.milliseconds = {
            f"p{p}": round(1e3 * float(np.percentile(self.times, p)), 2) for p in (50, 95, 99)
        }
        load.troublemakers = dict(self.strange)

    def is_over(self) -> bool:
        """Whether no client should ask any more."""
        if self.requests is not None:
            return len(self.times) >= self.requests
        return time.perf_counter() >= self.end

    async def client(self, number: int) -> None:
        """Ask, and compare the answers; connect again where a connection ends."""
        draw = random.Random(number)
        while not self.is_over():
            try:
                reader, writer = await self.connect()
                while not self.is_over():
                    await self.ask_once(reader, writer, draw.randrange(len(self.questions)))
                writer.close()
            except (ConnectionError, asyncio.IncompleteReadError):
                self.load.lost += 1

    async def connect(self) -> Any:
        """A new connection to the server, as streams."""
        return await asyncio.open_connection("127.0.0.1", self.server.port, limit=1 << 26)

    async def ask_once(self, reader: Any, writer: Any, i: int) -> None:
        """Ask question i, and note the time and what is wrong."""
        started = time.perf_counter()
        status, answer = await ask(reader, writer, self.bodies[i])
        self.times.append(time.perf_counter() - started)
        if len(self.times) == FIRST:
            self.load.memory.append(self.server.memory())
        if status == 200:
            self.load.wrong += are_right(answer, self.questions[i])
        else:
            self.load.errors[str(status)] = self.load.errors.get(str(status), 0) + 1

    async def hang(self) -> None:
        """Begin requests and never finish them."""
        await self.be_strange("hanging", _HEAD % 100 + b"{")

    async def send_garbage(self) -> None:
        """Send what is no HTTP, ten times a second."""
        await self.be_strange("garbage", b"\x00\xff" * 500 + b"\r\n\r\n")

    async def be_strange(self, name: str, sent: bytes) -> None:
        """Send these bytes on one connection after the other, and note how each is answered."""
        while not self.is_over():
            try:
                reader, writer = await self.connect()
                writer.write(sent)
                answer = await asyncio.wait_for(reader.readline(), self.end - time.perf_counter())
                writer.close()
                status = answer.split()[1].decode() if answer else "closed"
            except TimeoutError:
                status = "none until the end"
            except ConnectionError:
                status = "closed"
            self.strange[f"{name}: {status}"] += 1
            await asyncio.sleep(0.1)

    async def kill_a_worker(self) -> None:
        """In the middle of the load, kill a worker, and wait for the one that replaces it."""
        await asyncio.sleep(self.load.seconds / 2)
        before, started = self.server.started, time.perf_counter()
        os.kill(self.server.worker_pids[0], signal.SIGKILL)
        while self.server.started == before and not self.is_over():
            await asyncio.sleep(0.05)
        if self.server.started > before:
            self.load.replaced_seconds = round(time.perf_counter() - started, 2)


def resident(pid: int) -> int:
    """The resident bytes of a process; 0 of one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


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


def announce(what: str) -> None:
    """Say what begins in a second, when the processor has come to rest."""
    print(f"begins: {what}", flush=True)
    time.sleep(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="folder of a mixture with domains")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--kinds", default="short,long", help="of texts: short, long, odd")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--texts", type=int, default=500, help="different requests")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of all workers")
    parser.add_argument("--workers", type=int, default=1, help="processes of our server")
    parser.add_argument("--requests", type=int, help="end a load after so many, not by time")
    parser.add_argument("--trouble", action="store_true", help="some clients hang or send garbage")
    parser.add_argument("--only-ours", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.model is not None:
        return measure(arguments)
    with tempfile.TemporaryDirectory() as folder:
        arguments.model = str(Path(folder) / "minilm-five")
        save_five_experts(arguments.model)
        return measure(arguments)


def save_five_experts(folder: str) -> None:
    """Save all-MiniLM-L6-v2 as a mixture of five experts that differ, each of a domain."""
    torch.manual_seed(0)
    mixture = moe_fast.upcycle(
        pretrained(), num_experts=5, routing="enforced", domains=["a", "b", "c", "d", "e"]
    )
    with torch.no_grad():
        for mlp in mixture.transformers_model.moe_mlps().values():
            mlp.down_proj += 0.02 * torch.randn(mlp.down_proj.shape)
    mixture.save_pretrained(folder, create_model_card=False)


def measure(arguments: Any) -> int:
    """Measure what the arguments say, and write it."""
    model = load_model(arguments.model)
    kinds = arguments.kinds.split(",")
    asked = {kind: questions_of(model, kind, arguments.texts) for kind in kinds}
    announce(f"direct encode, {kinds[0]}")
    direct = direct_milliseconds(model, asked[kinds[0]], min(arguments.seconds, 5.0))
    print(f"direct encode of one request: {direct:.2f} ms", flush=True)
    loads: list[Load] = []
    for server in (OURS,) if arguments.only_ours else (OURS, PLAIN):
        loads += loads_of(server, arguments, asked)
    if arguments.output is not None:
        record = {
            "environment": environment(threads=arguments.threads, model=Path(arguments.model).name),
            "direct_encode_milliseconds": direct,
            "loads": [asdict(load) for load in loads],
        }
        write_json(arguments.output, record)
    return 0


def loads_of(name: str, arguments: Any, asked: dict[str, list[Question]]) -> list[Load]:
    """Start a server, and measure it with one client (first kind of texts) and with all."""
    workers = arguments.workers if name == OURS else 1
    threads = max(1, arguments.threads // workers)
    loads = []
    with Server(name, arguments.model, threads, workers) as server:
        for kind, questions in asked.items():
            alone = kind == next(iter(asked)) and not arguments.trouble
            for clients in (1, arguments.clients) if alone else (arguments.clients,):
                seconds = arguments.seconds if clients > 1 else arguments.seconds / 3
                load = Load(name, kind, clients, seconds, workers)
                announce(f"{name}, {kind}, {clients} clients")
                press = Press(
                    load,
                    server,
                    questions,
                    Path(arguments.model).name,
                    requests=arguments.requests if clients > 1 else None,
                    trouble=arguments.trouble,
                )
                asyncio.run(press.run())
                if name == OURS:
                    load.padding_avoided = padding_avoided(server.port)
                loads.append(load)
                print(load, flush=True)
    return loads


if __name__ == "__main__":
    sys.exit(main())
