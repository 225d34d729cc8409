"""The native libraries: what loads, and what is said where something does not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_fast import ops
from moe_fast.ops import native

from .helpers import need_native_library

need_native_library()

PACKAGE = Path(native.__file__).parents[1]
FOLDER = Path(os.environ.get("MOE_FAST_NATIVE_LIBRARY") or PACKAGE / "_native.so").parent
GPU_OPS = ["plan", "gather_rows", "combine_rows", "combine_rows_backward"]


@pytest.fixture
def cuda_library() -> Path:
    reason = native.why_unavailable("cuda")
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(f"CI needs the CUDA half: {reason}", pytrace=False)
    elif reason is not None:
        pytest.skip(f"{reason} (pip install -e '.[cuda-build]', make setup)")
    return FOLDER / "_native_cuda.so"


def registered(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_fast_cpp::{op}", key)


@pytest.mark.parametrize("op", GPU_OPS)
def test_kernels_are_registered_for_both_devices(cuda_library, op):
    """Without a GPU, and under a torch without CUDA: loaded, not launched."""
    assert registered(op, "CPU") and registered(op, "CUDA")


def test_what_is_offered_on_a_gpu(cuda_library):
    assert "cpp" in ops.available_backends("plan", "cuda")
    assert "cpp" not in ops.available_backends("expert_mlp", "cuda")


def test_the_cuda_half_names_no_folder_of_its_builder(cuda_library):
    root = str(PACKAGE.parent).encode()
    assert root not in cuda_library.read_bytes()


CODE = """
from moe_fast.ops import native
print(native.why_unavailable("cpu"), native.why_unavailable("cuda"), sep="|")
"""


def reasons(library: Path) -> list[str]:
    """Why a fresh process cannot use the library on the CPU and on a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ
        | {"MOE_FAST_NATIVE_LIBRARY": str(library), "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copy(FOLDER / "_native.so", tmp_path / "_native.so"))


def test_without_the_cuda_half(copy):
    assert reasons(copy) == ["None", "the native library was built without its CUDA half: CPU only"]


def test_a_damaged_cuda_half_leaves_the_cpu_half_alone(copy):
    copy.with_name("_native_cuda.so").write_bytes(b"no library")
    cpu, cuda = reasons(copy)
    assert cpu == "None"
    assert cuda.startswith("the native library's CUDA half does not load: ")


def test_without_any(tmp_path):
    cpu, cuda = reasons(tmp_path / "_native.so")
    assert cpu == cuda
    assert cpu.startswith("the native library is not built")


def test_other_devices():
    assert native.why_unavailable("mps") == "the native library has kernels for cpu and cuda only"
