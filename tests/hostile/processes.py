"""Cases in a few long-lived worker processes, each with a limit of time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.hostile.cases import SIGNALLED, TIMED_OUT, Result, all_cases, clock, try_case

SECONDS = 10.0  # for one input, as cases.clock counts them
_START_SECONDS = 300.0  # to load Python, torch and the rest, once for many inputs
_MEMORY = 12 * 2**30


def run_cases(numbers: Sequence[int], bases: Path, processes: int) -> Iterator[Result]:
    """The results of some of :func:`all_cases`, in the order they end."""
    cases = all_cases()
    waiting = list(reversed(numbers))
    workers = [_Worker(bases) for _ in range(min(processes, len(numbers)))]
    try:
        while workers:
            ready = wait([worker.pipe for worker in workers], timeout=0.5)
            for worker in list(workers):
                number, message = worker.number, None
                if worker.pipe in ready:
                    message = worker.received()
                    if message is None and number is None:
                        raise RuntimeError("a worker died before its first case")
                elif not worker.is_late():
                    continue
                if isinstance(message, Result):
                    yield message
                elif number is not None:
                    outcome = SIGNALLED if worker.pipe in ready else TIMED_OUT
                    code = worker.end()
                    case = cases[number]
                    yield Result(case.group, case.name, case.control, outcome, f"exit code {code}")
                    workers.remove(worker)
                    if not waiting:
                        continue
                    worker = _Worker(bases)
                    workers.append(worker)
                    continue
                if waiting:
                    worker.send(waiting.pop())
                else:
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that tries the cases whose numbers it is sent."""

    def __init__(self, bases: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.number: int | None = None
        self._process = context.Process(target=_work, args=(theirs, str(bases)), daemon=True)
        self._process.start()
        theirs.close()
        self._limit = self._now() + _START_SECONDS

    def send(self, number: int) -> None:
        self.number, self._limit = number, self._now() + SECONDS
        self.pipe.send(number)

    def received(self) -> Any:
        """What the process says; ``None`` where it has ended."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            return None

    def is_late(self) -> bool:
        return self._now() > self._limit

    def _now(self) -> float:
        return clock(self._process.pid or "self")

    def end(self) -> int | None:
        self.pipe.close()
        self._process.kill()
        self._process.join()
        return self._process.exitcode


def _work(pipe: Connection, bases: str) -> None:
    import resource
    import warnings

    os.environ |= {"HOSTILE_BASES": bases, "HF_HUB_OFFLINE": "1"}
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    cases = all_cases()
    _warm_up(Path(bases))
    pipe.send("ready")
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        with tempfile.TemporaryDirectory(dir=bases, prefix="case") as folder:
            result = try_case(cases[number], Path(bases), Path(folder))
        pipe.send(result)


def _warm_up(bases: Path) -> None:
    """Import what the cases need: it is not theirs to wait for."""
    from tests.hostile import data, models

    models.embed(bases / "moe")
    models.embed(bases / "dense")
    models.upcycle(bases / "bare")
    data.pairs(bases / "pairs.csv")
    data.vectors(bases / "vectors.parquet")
