"""tune: searches where the kernels run, says why where they do not."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from moe_fast.cli.tune import EXAMPLE
from tests.triton_ops.processes import needs_triton, run


def test_without_a_gpu_it_says_why(moe_fast_cli):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    result = moe_fast_cli(*shlex.split(EXAMPLE)[1:])
    assert result.exit_code == 1
    assert "nothing to tune on cpu" in result.stderr


def test_a_dense_model_is_refused(moe_fast_cli):
    result = moe_fast_cli("tune", "dense-model")
    assert result.exit_code == 1 and "dense" in result.stderr


@needs_triton
@pytest.mark.slow
def test_it_writes_the_table_and_says_what_changed(workspace):
    """Interpreted, on the mixture of the examples."""
    done = run(
        "-m", "moe_fast.cli", "tune", str(workspace / "mixture"), "--tokens", "16",
        "--dtype", "float32", "--seconds", "1",
        TRITON_INTERPRET="1", MOE_FAST_TUNING=str(workspace / "tables"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = workspace / "tables" / "interpreter.json"
    configs = json.loads(path.read_text())["configs"]
    assert len(configs) == 6
    assert all(key in done.stdout for key in configs)
    assert done.stdout.count("tried") == 6
    assert f"{path}: 6 entries written" in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["intermediate", "output"])
def test_a_mixture_of_one_projection_has_three_products(moe_fast_cli, tmp_path, target):
    upcycle = ["upcycle", "dense-model", "--num-experts", 2, "--target", target, "-o", "single"]
    assert moe_fast_cli(*upcycle).exit_code == 0
    done = run(
        "-m", "moe_fast.cli", "tune", str(Path("single").resolve()), "--tokens", "16",
        "--dtype", "float32", "--seconds", "1",
        TRITON_INTERPRET="1", MOE_FAST_TUNING=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    configs = json.loads((tmp_path / "interpreter.json").read_text())["configs"]
    assert sorted(key.split("/")[0] for key in configs) == [
        "grad_weight", "linear", "linear_transposed",
    ]  # fmt: skip
