"""One pass over the cases of some operations, here or in a fresh process.

Where a process's memory lies, and how its libraries warmed up, changes ratios by more than the
rounds within it differ. Only further processes show by how much.
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
    """What to measure once.

    Attributes:
        operations: operation files by name, in order.
        size: of :data:`bench.cases.SIZES`.
        seconds: for each case, as in :func:`bench.cases.measure`.
        threads: of torch.
        machine: the ceilings.
    """

    operations: tuple[str, ...]
    size: str
    seconds: float
    threads: int
    machine: Machine


def rows_of(one: Pass) -> Iterator[tuple[list[Row], float]]:
    """One case after another: rows measured in this process, and its processor_share() after."""
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
    """The same, measured in a process of its own, each case as soon as it is there.

    Raises:
        RuntimeError: the process failed; what it raised stands on its standard error.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(one, sender), daemon=True)
    process.start()
    sender.close()  # the child's copy is then the only one: its end is ours
    try:
        with suppress(EOFError):  # of a child that has ended
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
