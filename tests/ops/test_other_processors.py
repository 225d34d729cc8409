"""The native ops as on processors with less than this one: their tests, in a process per level.

What this processor has itself is what the tests of the ops run on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_fast.ops import native

from .helpers import need_native_library

need_native_library()

LEVELS = ["portable", "avx2", "avx512", "vnni", "avx512bf16", "amx"]
OWN = native.cpu_capability.rpartition(", ")[2]
CHOSEN = {
    "test_attention_cpp": "any_shape or many_blocks or the_first or views or nan or infinite",
    "test_expert_mlp_cpp": "equals_the_reference or any_shape or skipped or far_out",
    "test_route_cpp": "any_shape or equal_rows",
    "test_int8": "cpp and (any_shape or exact or not_finite or bfloat16)",
}
CODE = """
import sys, pytest
from moe_fast.ops import native
print(native.cpu_capability)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("level", LEVELS[: LEVELS.index(OWN)])
def test_the_ops_are_right_at_a_lower_level(level):
    """The code without AVX-512, and without oneDNN's kernels, on the tests of shapes and values."""
    has = report_of_tests(CHOSEN, MOE_FAST_CPU=level)
    assert has.endswith(f", {level}")
    assert level != "portable" or has.startswith("BLAS float32")


@pytest.mark.skipif(OWN != "amx", reason="without AMX, dots and blocks serve bf16 in every test")
@pytest.mark.parametrize("product", ["dots", "blocks"])
def test_the_products_beside_amx_are_right(product):
    has = report_of_tests({"test_expert_mlp_cpp": "any_shape"}, MOE_FAST_PRODUCT=product)
    assert "AMX tiles" not in has


def report_of_tests(names_by_file: dict[str, str], **environment: str) -> str:
    """Run tests in a process with these variables; return how it multiplies."""
    chosen = " or ".join(f"({file} and ({names}))" for file, names in names_by_file.items())
    folder = Path(__file__).parent
    files = [str(folder / f"{file}.py") for file in names_by_file]
    done = subprocess.run(
        [sys.executable, "-c", CODE, "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    has, *report = done.stdout.splitlines()
    assert " passed" in report[-1]
    assert "failed" not in report[-1] and "skipped" not in report[-1]
    return has


def import_with(**environment: str) -> subprocess.CompletedProcess:
    """Import the native library in a process of its own, with these variables."""
    return subprocess.run(
        [sys.executable, "-c", "from moe_fast.ops import native; print(native.cpu_capability)"],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )


def test_an_unknown_instruction_set_is_an_error_that_names_the_known_ones():
    done = import_with(MOE_FAST_CPU="avx3")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == (
        f"ValueError: MOE_FAST_CPU must be auto, {', '.join(LEVELS)}; got 'avx3'."
    )


def test_a_product_that_the_instruction_set_lacks_is_an_error_that_names_it():
    done = import_with(MOE_FAST_CPU="portable", MOE_FAST_PRODUCT="tiles")
    assert done.returncode != 0
    assert "MOE_FAST_PRODUCT asks for tiles, which portable does not have." in done.stderr


@pytest.mark.skipif(LEVELS[-1] == OWN, reason="this processor has every instruction set")
def test_an_instruction_set_that_the_processor_lacks_is_an_error_that_names_it():
    better = LEVELS[LEVELS.index(OWN) + 1]
    done = import_with(MOE_FAST_CPU=better)
    assert done.returncode != 0
    has = ", ".join(LEVELS[: LEVELS.index(OWN) + 1])
    assert f"MOE_FAST_CPU asks for {better}" in done.stderr and f"It has {has}." in done.stderr


@pytest.mark.parametrize("level", ["auto", ""])
def test_auto_is_the_best_instruction_set_that_the_processor_has(level):
    assert import_with(MOE_FAST_CPU=level).stdout.strip() == native.cpu_capability
