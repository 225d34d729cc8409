"""Counts the compiled library's instructions on a fixed input by valgrind; free of timing noise.

    python -m bench.instructions          takes minutes: torch starts under valgrind, three times

Each operation runs once on one thread, in its own process. Only instructions within it count,
including those by which oneDNN generates its kernels. Valgrind supports AVX2 at most, so the counts
say nothing about AVX-512. Other libraries have no counts; counts are compared with those of an
earlier build (``python -m bench.compare OLD NEW``).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_fast.ops import native

from .cases import OURS
from .record import Recorder, Row

SHAPE = {"T": 512, "D": 128, "H": 512, "E": 8, "K": 2}
FUNCTIONS = ("plan", "expert_mlp", "expert_mlp_backward")
# torch alone, because moe_fast's other imports would take minutes more. Sizes as in SHAPE.
PROGRAM = """
import sys, torch
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[1])
T, D, H, E, K = map(int, sys.argv[2:])
torch.manual_seed(0)
ops = torch.ops.moe_fast_cpp
ids = torch.rand(T, E).topk(K).indices
x, g = torch.randn(T, D), torch.randn(T, D)
up, down = torch.randn(E, H, D), torch.randn(E, D, H)
up_bias, down_bias = torch.randn(E, H), torch.randn(E, D)
weights = torch.rand(T, K)
plan = ops.plan(ids, E)
y, saved = ops.expert_mlp(x, up, down, up_bias, down_bias, weights, *plan, "gelu", False, True)
ops.expert_mlp_backward(
    g, x, up, down, up_bias, down_bias, weights, *plan, saved, "gelu", False
)
"""


def count(name: str) -> int:
    """Return the number of instructions of one of ``FUNCTIONS``.

    Raises:
        RuntimeError: valgrind or the compiled library is missing, or the run fails.
    """
    if shutil.which("valgrind") is None:
        raise RuntimeError("valgrind is not installed (Debian: apt-get install valgrind)")
    reason = native.why_unavailable("cpu")
    if reason is not None:
        raise RuntimeError(reason)
    library = next(p for p in torch.ops.loaded_libraries if Path(p).name == "_native.so")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        command += [f"--toggle-collect=moe_fast::{name}_cpu(*"]
        command += [sys.executable, "-c", PROGRAM, library, *map(str, SHAPE.values())]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the run under valgrind failed:\n{done.stderr[-2000:]}")
        return instructions(out.read_text())


def instructions(dump: str) -> int:
    """Return the total of a callgrind file.

    Raises:
        RuntimeError: the file has no total, or nothing was counted.
    """
    found = re.search(r"^(?:summary|totals): (\d+)", dump, re.MULTILINE)
    if found is None or int(found[1]) == 0:
        raise RuntimeError("valgrind counted nothing: has the library been stripped of its names?")
    return int(found[1])


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print and write the record; return 1 if counting fails."""
    parser = argparse.ArgumentParser(prog="bench.instructions", description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the record to this file")
    arguments = parser.parse_args(argv)
    recorder = Recorder(None, products=native.cpu_capability)
    try:
        counts = {name: count(name) for name in FUNCTIONS}
    except RuntimeError as error:
        print(f"bench.instructions: error: {error}", file=sys.stderr)
        return 1
    for name, number in counts.items():
        row = Row(f"{name}, instructions", SHAPE, "float32", OURS, OURS, instructions=number)
        recorder.add([row])
        print(f"{name:20s} {number:>14,d} instructions")
    if arguments.json:
        recorder.write(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
