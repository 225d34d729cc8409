"""Peak memory, forward and backward, of the expert MLP and of the contrastive loss.

    python -m bench.peak_memory "expert MLP" moe_fast 4096

Each figure is measured in a fresh process. The process runs once on a tiny problem to load the
libraries, makes the tensors, resets the kernel's high-water mark and runs once. It reports how far
the mark rose above the memory in use: this is what the candidate takes, including outputs and
gradients. Only Linux has this mark. malloc is told to map every block above 64 KiB separately, so
that freed memory is no longer in use.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import info_nce
from .cases import OURS
from .peers import dense, transformers_experts
from .problem import Problem, bert, timed
from .record import Row

DIM = 384
MLP, LOSS = "expert MLP", "contrastive loss"
CANDIDATES = {
    MLP: (OURS, "reference", "eager", "grouped_mm", "dense"),
    LOSS: (OURS, info_nce.THEIRS, f"{info_nce.CACHED}, 32"),
}
SUFFIX = ", forward + backward, peak memory"


def rows(size: str) -> list[Row]:
    """Measure every candidate and number of tokens (or pairs); the baseline is ours."""
    counts = {"tiny": [64], "quick": [4096], "default": [1024, 4096, 16384]}.get(
        size, [1024, 4096, 16384, 65536]
    )
    most = {MLP: 65536, LOSS: 8192}  # the plain loss holds matrices of B x B
    return [
        row(what, who, count)
        for what, names in CANDIDATES.items()
        for count in counts
        for who in names
        if count <= most[what]
    ]


def row(what: str, who: str, count: int) -> Row:
    """Measure one candidate in a process of its own."""
    shape = {"B": count, "d": DIM}
    if what == MLP:
        shape = bert(count, DIM, 1, torch.float32).letters
    found: dict[str, Any] = {"reason": "peak memory is measured on Linux alone"}
    if Path("/proc/self/clear_refs").exists():
        found = {"peak_bytes": in_fresh_process(what, who, count)}
    return Row(what + SUFFIX, shape, "float32", who, OURS, sweep=next(iter(shape)), **found)


def in_fresh_process(what: str, who: str, count: int) -> int:
    """Return the bytes that a new process reports.

    Raises:
        RuntimeError: the process failed; the message holds its standard error.
    """
    command = [sys.executable, "-m", __name__, what, who, str(count)]
    path = os.pathsep.join(sys.path)  # this package, wherever it was found
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the measuring process for {who} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def call_of(what: str, who: str, count: int) -> Callable[[], Any]:
    """Return a function that runs forward and backward of one candidate."""
    if what == LOSS:
        leaves = [torch.randn(count, DIM, requires_grad=True) for _ in range(2)]
        return info_nce.run_of(who, leaves, symmetric=True)
    problem = Problem(bert(count, DIM, 1, torch.float32, bias=False))
    if who == "dense":
        return timed(dense, *problem.dense(), True)
    if who == "reference":
        problem.backend = "torch"
    run = problem.forward if who in (OURS, "reference") else transformers_experts(problem, who)
    return timed(run, problem.tensors, problem.upstream, True)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return how far the memory in use rises while ``run`` runs."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    outputs = run()
    peak = status("VmHWM")
    del outputs
    return max(0, peak - before)


def status(name: str) -> int:
    """Return a value of /proc/self/status in bytes; ``RuntimeError`` if it is missing."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Print one candidate's peak in bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=CANDIDATES)
    parser.add_argument("who", help="a candidate, by its name")
    parser.add_argument("count", type=int, help="tokens, or pairs")
    arguments = parser.parse_args(argv)
    call_of(arguments.what, arguments.who, 64)()
    print(peak_bytes(call_of(arguments.what, arguments.who, arguments.count)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
