"""The benchmarks run, on little work, and check what they claim to check."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import contrastive_loss, dispatch, expert_mlp, import_time, memory
from bench.cases import near
from bench.record import read_record
from tests.models.tiny import save_sentence_transformer


def test_expert_mlp_writes_every_table(tmp_path, capsys):
    path = tmp_path / "expert_mlp.json"
    arguments = ["--rounds", "1", "--max-tokens", "32", "--dims", "32", "--json", str(path)]
    assert expert_mlp.main(arguments) == 0
    record = read_record(path)
    assert record.environment["read_bandwidth"] > 1e8
    dense = [row for row in record.rows if row.operation == "expert_mlp, beside dense, forward"]
    assert [row.who for row in dense] == 4 * ["dense", "moe_fast"]
    assert all(row.floor_seconds for row in dense)
    names = [row.who for row in record.rows if "beside transformers" in row.operation]
    assert names == 4 * ["moe_fast", "eager", "batched_mm", "grouped_mm"]
    assert capsys.readouterr().out.count("of the floor") == 4


def test_expert_mlp_refuses_outputs_that_are_wrong():
    y = torch.ones(3, dtype=torch.float64)
    check = near([y], 1e-5, apart=["dense"])
    check({"moe_fast": [y.float()], "dense": [y * 2]})
    with pytest.raises(AssertionError, match="eager, output 0"):
        check({"moe_fast": [y], "eager": [y * 1.001]})


@pytest.fixture
def tiny_encoder(tmp_path, monkeypatch):
    """bench.embedding on a tiny model in place of MiniLM."""
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    from bench import embedding

    folder = save_sentence_transformer(tmp_path)
    monkeypatch.setattr(embedding, "pretrained_folder", lambda: folder)
    monkeypatch.setattr(embedding, "go_offline", lambda: None)
    monkeypatch.setattr(embedding, "MAX_TOKENS", 32)
    return embedding


def test_embedding_writes_every_table(tiny_encoder, tmp_path, capsys):
    path, data = tmp_path / "embedding.json", tmp_path / "texts.jsonl"
    texts = [f"w{i} " * (1 + 7 * i) for i in range(8)]
    data.write_text("".join(json.dumps({"b": text}) + "\n" for text in [*texts, texts[0]]))
    arguments = ["--rounds", "1", "--texts", "7", "--data", str(data), "--json", str(path)]
    assert tiny_encoder.main(arguments) == 0
    record = json.loads(path.read_text())
    assert record["texts"] == 7 and list(record["results"]) == ["float32", "bfloat16"]
    for rows in record["results"].values():
        assert [row["name"] for row in rows] == ["moe_fast", "eager, padded", "dense"]
    assert capsys.readouterr().out.count("of dense's time") == 2
    with pytest.raises(ValueError, match="--texts must be at most 8"):
        tiny_encoder.main([*arguments, "--texts", "9"])


def test_embedding_without_a_file_draws_texts(tiny_encoder):
    texts = tiny_encoder.read_texts(None, 500)
    assert len(set(texts)) == 500 and texts == tiny_encoder.read_texts(None, 500)
    words = sum(len(text.split()) for text in texts) / 500
    assert 150 < words < 250  # MedQuAD's answers: 201


def test_embedding_refuses_vectors_that_differ(tiny_encoder):
    y = torch.ones(3, 4)
    check = tiny_encoder.check_same(1e-4)
    check({"moe_fast": y, "eager, padded": y.clone(), "dense": y * 2})
    with pytest.raises(AssertionError, match="vectors differ by"):
        check({"moe_fast": y, "eager, padded": y * 1.001, "dense": y})


def test_natural_step_writes_its_table(tiny_encoder, monkeypatch, tmp_path, capsys):
    from bench import natural_step

    monkeypatch.setattr(natural_step, "pretrained_folder", tiny_encoder.pretrained_folder)
    monkeypatch.setattr(natural_step, "go_offline", lambda: None)
    monkeypatch.setattr(natural_step, "MAX_TOKENS", 32)
    path, data = tmp_path / "natural_step.json", tmp_path / "pairs.jsonl"
    rows = [{"a": f"w{i}", "b": f"w{i} " * (1 + 7 * (i % 6))} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    arguments = ["--data", str(data), "--rounds", "1", "--json", str(path)]
    assert natural_step.main([*arguments, "--batch", "7"]) == 0
    (rows,) = json.loads(path.read_text())["results"].values()
    assert [row["name"] for row in rows] == ["moe_fast", "padded, ours", "padded, eager"]
    assert "gradient differs by" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--batch must be at most 8"):
        natural_step.main([*arguments, "--batch", "9"])


def test_natural_step_refuses_gradients_that_differ():
    from bench.natural_step import check_gradients

    g = {"loss": torch.ones(()), "weight": torch.ones(3)}
    check_gradients({"moe_fast": g, "padded, eager": dict(g)}, 1e-3)
    with pytest.raises(AssertionError, match="padded, eager: gradient differs"):
        check_gradients(
            {"moe_fast": g, "padded, eager": g | {"weight": torch.ones(3) * 1.01}}, 1e-3
        )
    with pytest.raises(AssertionError, match="gradients of .'weight'."):
        check_gradients({"moe_fast": g, "padded, eager": {"loss": g["loss"]}}, 1e-3)


def test_contrastive_loss_writes_every_figure(tmp_path, capsys):
    path = tmp_path / "contrastive_loss.json"
    sizes = ["--batch", "64", "--dim", "8", "--chunks", "16", "--rounds", "1", "--large", "128"]
    arguments = [*sizes, "--memory-batches", "--memory-dim", "8", "--json", str(path)]
    assert contrastive_loss.main(arguments) == 0
    record = json.loads(path.read_text())
    names = [row["name"] for row in record["speed"]["results"]]
    assert names == ["moe_fast", "floor", "MNRL", "cached, 16", "cached, 32"]
    assert set(record["large"]["seconds"]) == {"products", "moe_fast"}
    assert capsys.readouterr().out.count("target") == 4


@pytest.mark.slow
@pytest.mark.parametrize("run", ["ours", "mnrl", "cached"])
def test_contrastive_loss_measures_memory_in_fresh_processes(run):
    """The dense loss holds at least three B x B matrices, the tiled one less than one."""
    matrix = 4096**2 * 4 / 2**20
    extra = contrastive_loss.memory(run, 4096, 16)
    assert extra > 3 * matrix if run == "mnrl" else extra < 3 * matrix
    assert run != "ours" or extra < matrix


def test_contrastive_loss_refuses_outputs_that_differ():
    y = torch.ones(3)
    contrastive_loss.check({"moe_fast": [y], "MNRL": [y.clone()], "floor": [None]})
    with pytest.raises(AssertionError, match="MNRL, output 0: differs"):
        contrastive_loss.check({"moe_fast": [y], "MNRL": [y * 1.001]})


def test_an_import_that_is_not_lean_is_an_error(monkeypatch):
    """That ours is lean is for tests/test_imports.py to say."""
    loaded = {import_time.IMPORTS["moe_fast"]: ["torch", "triton"]}
    monkeypatch.setattr(
        import_time,
        "run_child",
        lambda imports: import_time.Import(1.0, 1.0, loaded.get(imports, ["torch"])),
    )
    with pytest.raises(AssertionError, match=r"loads \['triton'\]"):
        import_time.check_lean()


def test_a_failing_import_is_reported():
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        import_time.run_child("import no_such_module")


def test_dispatch_writes_every_table(tmp_path, capsys):
    path = tmp_path / "dispatch.json"
    assert dispatch.main(["--slots", "512", "--rounds", "1", "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [name.partition(",")[0] for name in results] == (
        ["plan"] * 3 + ["gather_rows", "combine_rows"] * 2
    )
    assert capsys.readouterr().out.count("target 5.0") == 3


def test_dispatch_refuses_plans_that_differ():
    ids = dispatch.random_ids(64, 2, 4)
    right, wrong = dispatch.plain_plan(ids, 4), dispatch.plain_plan(ids, 4)
    dispatch.check_plans({"moe_fast": right, "other": wrong})
    wrong.row_to_slot[0] += 1
    with pytest.raises(AssertionError, match="other differs from moe_fast in row_to_slot"):
        dispatch.check_plans({"moe_fast": right, "other": wrong})


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_measures_what_is_there():
    measured = memory.measure(2048, 64, 1, "torch", threads=1)
    assert measured.z == 2048 * 256 * 4
    assert measured.z <= measured.held <= measured.peak
