"""The benchmarks run, on little work, and check what they claim to check."""

from __future__ import annotations

import json

import pytest
import torch

from bench import import_time, moe_mlp


def test_moe_mlp_writes_every_table(tmp_path, capsys):
    path = tmp_path / "moe_mlp.json"
    assert moe_mlp.main(["--tokens", "16", "--rounds", "1", "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    directions = ("forward", "forward + backward")
    assert list(results) == [f"{d}, K={k}" for k in (1, 2) for d in directions]
    for rows in results.values():
        assert [row["name"] for row in rows] == ["dense", "eager loop", "MoEMLP"]
    assert capsys.readouterr().out.count("x dense") == 4


def test_moe_mlp_refuses_outputs_that_differ():
    y = torch.ones(3)
    moe_mlp.check_equal({"MoEMLP": y, "eager loop": y.clone()})
    with pytest.raises(AssertionError, match="differ by"):
        moe_mlp.check_equal({"MoEMLP": y, "eager loop": y * 1.001})
    with pytest.raises(AssertionError, match="gradients differ"):
        moe_mlp.check_equal({"MoEMLP": {"y": y, "x": y}, "eager loop": {"y": y}})


def test_import_is_lean():
    import_time.check_lean()


def test_a_failing_import_is_reported():
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        import_time.run_child("import no_such_module")
