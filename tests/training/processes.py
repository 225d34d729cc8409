"""Runs in processes of their own, one or several with gloo between them, that can be killed.

They come from one server that has imported the libraries once: a run starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["sentence_transformers", "datasets", "accelerate", "pyarrow", "torch.distributed.fsdp"]
CONTEXT.set_forkserver_preload([*PRELOADED, "moe_fast.losses", "moe_fast.training"])
KILLED = -9


class Run:
    """``target(*args)`` in each of ``world_size`` processes; what they print goes into a file."""

    def __init__(self, log: Path, world_size: int, target: Callable[..., Any], *args: Any) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.args = args  # shared values among them must live until the processes have them
        port = _free_port()
        self.processes = [
            CONTEXT.Process(target=_enter, args=(log, rank, world_size, port, target, args))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()  # SIGKILL

    def codes(self, timeout: float = 300) -> list[int | None]:
        """The exit codes, when all have ended; a process killed by a signal gives minus that."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if self.alive():
            self.kill()
            pytest.fail(f"no end after {timeout} s:\n{self.tail()}")
        return [process.exitcode for process in self.processes]

    def expect_success(self, timeout: float = 300) -> None:
        # One that has died leaves the others waiting for it.
        end = time.monotonic() + timeout
        while self.alive() and time.monotonic() < end:
            if any(process.exitcode for process in self.processes):
                self.kill()
            time.sleep(0.01)
        codes = self.codes(1)
        assert codes == [0] * len(codes), self.tail()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


def _enter(
    log: Path, rank: int, world_size: int, port: int, target: Callable[..., Any], args: tuple
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
    target(*args)
    if world_size > 1:
        import torch

        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
