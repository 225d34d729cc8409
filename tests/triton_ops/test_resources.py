"""Compiled ahead of time for GPUs that are not here: no spills, tensor cores, shared memory."""

from __future__ import annotations

import json

import pytest

from .processes import ROOT, needs_triton, run

NAMES = ("up", "linear", "grad_hidden", "grad_weight", "add_product", "info_nce")
PRODUCTS = r"^(up|linear|grad_hidden|grad_weight|add_product)_kernel|^info_nce\w* .*TEXTS=False"
TABLE = ROOT / "docs" / "kernels-resources.json"


def compile_kernels(tmp_path, *arguments: str) -> dict:
    done = run(
        "-m", "bench.triton_resources", "--write", str(tmp_path / "table.json"), *arguments,
        TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((tmp_path / "table.json").read_text())


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_bert_base_in_bfloat16(tmp_path, target):
    """Exit code 0 says that nothing spills and every product uses the tensor cores."""
    table = compile_kernels(
        tmp_path, "--targets", target, "--problems", "bfloat16", "--only", PRODUCTS
    )
    kernels = table["resources"][target]
    for name in NAMES:
        assert sum(k.startswith(name) for k in kernels) >= 2, name
    assert all(used["tensor_cores"] and used["registers"] > 32 for used in kernels.values())
    copied = {k for k in kernels if kernels[k]["tile_copies"]}
    assert copied == {k for k in kernels if "DESCRIPTORS=True" in k}
    assert len(copied) == (5 if target == "sm_90" else 0)


BAD = """
import sys, torch
import moe_fast.triton_ops.up as up
from bench import triton_resources as r
from moe_fast.triton_ops.config import Config
x, w = r._new(4096, 768, dtype=torch.bfloat16), r._new(8, 3072, 768, dtype=torch.bfloat16)
with r.recorded("sm_90") as launches:
    up.up(x, w, None, r._new(9, dtype=torch.int64), r._new(4096, dtype=torch.int64), act="gelu",
          gated=False, want_z=True, want_h=True, config=Config(128, 256, 128, 4, 3))
print(r.faults(launches[0], "sm_90", r.compile_launch(launches[0], "sm_90")))
"""


@needs_triton
def test_a_configuration_too_large_is_found():
    done = run("-c", BAD, TRITON_INTERPRET=None)
    assert "spills" in done.stdout and "shared memory" in done.stdout, done.stdout + done.stderr


def test_the_committed_table_has_every_target_and_no_spills():
    resources = json.loads(TABLE.read_text())["resources"]
    assert set(resources) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for kernels in resources.values():
        assert len(kernels) > 100
        assert not any(used["spills"] for used in kernels.values())


@needs_triton
@pytest.mark.slow
def test_the_committed_table_is_what_the_kernels_compile_to(tmp_path):
    import triton

    committed = json.loads(TABLE.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is Triton {committed['triton']}'s, here is {triton.__version__}")
    assert compile_kernels(tmp_path) == committed
