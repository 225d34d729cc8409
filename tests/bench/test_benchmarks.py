"""The whole jobs run, on little work, and check what they claim to check."""

from __future__ import annotations

import json

import pytest

from bench import embedding, import_time
from bench.__main__ import main
from bench.cases import OURS, WrongResult, measure
from bench.record import read_record
from tests.models.tiny import save_sentence_transformer


@pytest.fixture
def tiny_encoder(tmp_path, monkeypatch):
    """A tiny model in place of MiniLM."""
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    from moe_fast.demo import pretrained

    folder = save_sentence_transformer(tmp_path)
    monkeypatch.setattr(pretrained, "pretrained_folder", lambda: folder)
    monkeypatch.setattr(pretrained, "go_offline", lambda: None)
    monkeypatch.setattr(embedding, "MAX_TOKENS", 32)


def test_whole_jobs_write_every_row(tiny_encoder, tmp_path, monkeypatch):
    path, data = tmp_path / "jobs.json", tmp_path / "pairs.jsonl"
    lines = [{"a": f"w{i}", "b": f"w{i} " * (1 + 7 * i)} for i in range(5)]
    data.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    monkeypatch.setenv(embedding.DATA, "the program sets it, which ends with this test")
    words = ["embedding", "natural_step", "--size", "tiny", "--processes", "1", "--seconds", "0"]
    assert main([*words, "--data", str(data), "--json", str(path)]) == 0
    found = {}
    for row in read_record(path).rows:
        found.setdefault((row.operation, row.dtype), []).append(row.who)
        assert row.reason is None
    names = ["moe_fast", "eager, padded", "dense"]
    assert found.pop(("embedding", "float32")) == found.pop(("embedding", "bfloat16")) == names
    assert found == {
        ("natural step", "float32"): ["moe_fast", "padded, ours", "padded, eager"],
        ("natural step beside dense", "bfloat16"): ["moe_fast", "dense"],
    }
    with pytest.raises(ValueError, match="holds 5 different answers; 9 are needed"):
        embedding.read_pairs(9)


def test_without_a_file_texts_are_drawn(monkeypatch):
    monkeypatch.delenv(embedding.DATA, raising=False)
    pairs = embedding.read_pairs(500)
    assert len(set(pairs)) == 500 and pairs == embedding.read_pairs(500)
    words = sum(len(text.split()) for _, text in pairs) / 500
    assert 150 < words < 250  # MedQuAD's answers: 201


def test_an_import_that_is_not_lean_is_an_error(monkeypatch):
    """That ours is lean is for tests/test_imports.py to say."""
    loaded = {import_time.IMPORTS[OURS]: {"torch", "triton"}}
    monkeypatch.setattr(import_time, "loaded_modules", lambda code: loaded.get(code, {"torch"}))
    (case,) = import_time.cases("tiny")
    with pytest.raises(WrongResult, match=r"loads \['triton'\]"):
        measure(case, seconds=0, rounds=1)


def test_a_failing_import_is_reported():
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        import_time.loaded_modules("import no_such_module")
