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
import importlib, os, sys
from moe_fast.ops import native
for library in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    os.environ["MOE_FAST_NATIVE_LIBRARY"] = library
    importlib.reload(native)
    print(native.why_unavailable("cpu"), native.why_unavailable("cuda"), sep="|", flush=True)
    os._exit(0)
"""


def test_without_a_half_or_both(tmp_path):
    """Why a process cannot use the library on the CPU and on a GPU; each child loads one anew."""
    libraries = [tmp_path / kind / "_native.so" for kind in ("absent", "cpu", "damaged")]
    for library in libraries[1:]:
        library.parent.mkdir()
        shutil.copy(FOLDER / "_native.so", library)
    libraries[2].with_name("_native_cuda.so").write_bytes(b"no library")
    done = subprocess.run(
        [sys.executable, "-c", CODE, *libraries],
        env=os.environ
        | {"MOE_FAST_NATIVE_LIBRARY": str(libraries[0]), "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    absent, without, damaged = (line.split("|") for line in done.stdout.splitlines())
    assert absent[0] == absent[1]
    assert absent[0].startswith("the native library is not built")
    assert without == ["None", "the native library was built without its CUDA half: CPU only"]
    assert damaged[0] == "None"
    assert damaged[1].startswith("the native library's CUDA half does not load: ")


def test_other_devices():
    assert native.why_unavailable("mps") == "the native library has kernels for cpu and cuda only"
