"""Peak memory of the expert MLP, forward and backward, each figure from a fresh process.

    python -m bench.peak_memory --who moe_fast --tokens 4096

A process runs once on a tiny problem so that libraries load, makes the tensors, resets the kernel's
high-water mark, runs once, and reports how far the mark rose above what was in use: what the
candidate itself takes, outputs and gradients included. Linux alone has that mark. malloc is told to
map whatever exceeds 64 KiB on its own: memory that was freed is then in use no longer.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import OURS
from .expert_mlp import Problem, Shape, peers, timed
from .record import Row

DIM, EXPERTS = 384, 8
CANDIDATES = (OURS, "reference", "eager", "grouped_mm", "dense")
OPERATION = "expert MLP, forward + backward, peak memory"


def rows(size: str) -> list[Row]:
    """A row per candidate and number of tokens; the baseline is ours."""
    tokens = {"tiny": [64], "quick": [4096], "default": [1024, 4096, 16384]}.get(
        size, [1024, 4096, 16384, 65536]
    )
    return [row(who, count) for count in tokens for who in CANDIDATES]


def row(who: str, tokens: int) -> Row:
    """One process."""
    shape = {"T": tokens, "D": DIM, "H": 4 * DIM, "E": EXPERTS, "K": 1}
    found: dict[str, Any] = {"reason": "peak memory is measured on Linux alone"}
    if Path("/proc/self/clear_refs").exists():
        found = {"peak_bytes": in_fresh_process(who, tokens)}
    return Row(OPERATION, shape, "float32", who, OURS, sweep="T", **found)


def in_fresh_process(who: str, tokens: int) -> int:
    """The bytes that a process of its own reports.

    Raises:
        RuntimeError: with its words, if it fails.
    """
    command = [sys.executable, "-m", __name__, "--who", who, "--tokens", str(tokens)]
    path = os.pathsep.join(sys.path)  # this package, wherever it was found
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the measuring process for {who} failed:\n{done.stderr}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def call_of(who: str, tokens: int, dim: int) -> Callable[[], Any]:
    """Forward and backward of one candidate."""
    problem = Problem(Shape(tokens, dim, 1, torch.float32), bias=False)
    if who == "dense":
        plain, tensors, upstream = problem.dense()
        return timed(plain, tensors, upstream, True)
    backends = {OURS: "auto", "reference": "torch"}
    if who in backends:
        return timed(
            lambda t: problem.ours(t, backends[who]), problem.tensors, problem.upstream, True
        )
    return timed(peers(problem)[who], problem.tensors, problem.upstream, True)


def peak_bytes(run: Callable[[], Any]) -> int:
    """How far memory in use rises while ``run`` runs."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    outputs = run()
    peak = _status("VmHWM")
    del outputs
    return max(0, peak - before)


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Print one candidate's peak as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--who", choices=CANDIDATES, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    arguments = parser.parse_args(argv)
    call_of(arguments.who, 64, 16)()
    found = peak_bytes(call_of(arguments.who, arguments.tokens, DIM))
    print(json.dumps({"peak_bytes": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
