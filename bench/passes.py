"""One pass over the cases of some operations, in this process or in a fresh one.

Ratios depend on a process's memory layout and on how its libraries warmed up, more than they vary
between the rounds of one process. Only further processes show by how much.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection

import torch

from .cases import measure
from .machine import Machine, processor_share
from .record import Row


@dataclass(frozen=True)
class Pass:
    """What one pass measures.

    Attributes:
        operations: names of operation files, in order.
        size: one of :data:`bench.cases.SIZES`.
        seconds: for each case, as in :func:`bench.cases.measure`.
        threads: the number of torch's threads.
        machine: the limits of the machine.
    """

    operations: tuple[str, ...]
    size: str
    seconds: float
    threads: int
    machine: Machine


def rows_of(one: Pass) -> Iterator[tuple[list[Row], float]]:
    """Measure case by case in this process; yield the rows, and processor_share() after them."""
    torch.set_num_threads(one.threads)
    tiny = one.size == "tiny"
    for name in one.operations:
        for case in import_module(f"{__package__}.{name}").cases(one.size):
            rows = measure(
                case,
                one.machine,
                seconds=one.seconds,
                rounds=1 if tiny else 40,
                min_sample_seconds=0 if tiny else 0.005,
            )
            yield rows, processor_share()


def in_fresh_process(one: Pass) -> Iterator[tuple[list[Row], float]]:
    """Yield what :func:`rows_of` yields, measured in a new process, case by case.

    Raises:
        RuntimeError: the process failed; its standard error shows why.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(one, sender), daemon=True)
    process.start()
    sender.close()  # only the child's copy remains, so the pipe ends with the child
    try:
        with suppress(EOFError):  # when the child has ended
            while True:
                yield receiver.recv()
        process.join()
    finally:
        process.terminate()
    if process.exitcode:
        raise RuntimeError(f"the measuring process failed with exit code {process.exitcode}.")


def _send_rows(one: Pass, sender: Connection) -> None:
    for measured in rows_of(one):
        sender.send(measured)
