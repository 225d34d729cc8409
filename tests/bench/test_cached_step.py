"""The benchmark of the cached step runs, on little work, and checks what it claims to check."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sentence_transformers")

from bench import cached_step


def test_writes_every_table(tmp_path, capsys):
    path = tmp_path / "cached_step.json"
    small = ["--rows", "6", "--layers", "1", "--dim", "16", "--tokens-per-chunk", "128"]
    assert cached_step.main([*small, "--rounds", "1", "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert list(results) == ["equal", "natural", "router"]
    assert [row["name"] for row in results["router"]] == ["plain", "CachedLoss"]
    assert len(results["natural"]) == 4
    assert capsys.readouterr().out.count("x plain") == 3


def test_refuses_gradients_that_differ():
    right = {"loss": torch.ones(()), "w": torch.ones(3)}
    cached_step.check_equal({"plain": right, "CachedLoss": right})
    with pytest.raises(AssertionError, match="CachedLoss: gradient differs"):
        cached_step.check_equal({"plain": right, "CachedLoss": right | {"w": torch.ones(3) * 1.01}})
    with pytest.raises(AssertionError, match=r"gradients of \['w'\]"):
        cached_step.check_equal({"plain": right, "CachedLoss": {"loss": torch.ones(())}})
