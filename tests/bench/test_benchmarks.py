"""The benchmarks run, on little work, and check what they claim to check."""

from __future__ import annotations

import json

import pytest
import torch

from bench import expert_mlp, import_time, moe_mlp
from bench.cases import near


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


def test_expert_mlp_writes_every_table(tmp_path, capsys):
    path = tmp_path / "expert_mlp.json"
    arguments = ["--rounds", "1", "--max-tokens", "32", "--dims", "32", "--json", str(path)]
    assert expert_mlp.main(arguments) == 0
    record = json.loads(path.read_text())
    assert record["read_bandwidth"] > 1e8
    assert len(record["dense"]) == len(record["peers"]) == 4
    for rows in record["peers"].values():
        assert [row["name"] for row in rows] == ["moe_fast", "eager", "batched_mm", "grouped_mm"]
    assert capsys.readouterr().out.count("of the floor") == 4


def test_expert_mlp_refuses_outputs_that_are_wrong():
    y = torch.ones(3, dtype=torch.float64)
    check = near([y], 1e-5, apart=["dense"])
    check({"moe_fast": [y.float()], "dense": [y * 2]})
    with pytest.raises(AssertionError, match="eager, output 0"):
        check({"moe_fast": [y], "eager": [y * 1.001]})


def test_import_is_lean():
    import_time.check_lean()


def test_a_failing_import_is_reported():
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        import_time.run_child("import no_such_module")
