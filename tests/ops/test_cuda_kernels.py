"""The GPU's kernels, run on the CPU by ``cuda_on_cpu/``: right, in bounds, without races.

Their own source is compiled by the C++ compiler, under sanitizers, and run thread by thread over
random problems; the plan of a problem is cut into several blocks, and threads take turns in random
order. Skipped where there is no GCC or Clang; with ``CI=true`` that is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "cuda_on_cpu" / "main.cpp"
SECONDS = 5
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiler() -> str:
    found = next(filter(None, map(shutil.which, ["g++", "clang++"])), None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("CI needs g++ or clang++", pytrace=False)
    elif found is None:
        pytest.skip("neither g++ nor clang++ was found")
    return found


def build_and_run(compiler: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    program = folder / "kernels"
    command = [compiler, "-std=c++20", "-O1", "-g", *options, str(SOURCE), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return subprocess.run(
        [program, "4", str(SECONDS)],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernels(compiler, tmp_path, sanitizer):
    done = build_and_run(compiler, tmp_path, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 0, done.stdout


def test_a_missing_barrier_is_a_race(compiler, tmp_path):
    """That the check can fail: without __syncwarp, as it must be on a GPU."""
    done = build_and_run(compiler, tmp_path, "-fsanitize=thread", "-DWITHOUT_SYNCWARP")
    assert done.returncode != 0
    assert "data race" in done.stderr and "plan_kernels.cuh" in done.stderr
