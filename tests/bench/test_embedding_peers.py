"""bench.embedding_peers: a measurement in pieces, which continues where it stopped."""

from __future__ import annotations

import json
import math
import threading

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")

from bench import embedding_peers as e
from bench.cases import OURS, WrongResult
from bench.record import read_record
from tests.models.tiny import save_sentence_transformer

NAMES = [OURS, e.DENSE]


def test_pieces_hold_every_text_once_and_whole_batches_of_the_sorted_texts():
    texts = ["x" * ((37 * i) % 501) for i in range(1000)]
    pieces = e.pieces_of(texts)
    assert sorted(i for piece in pieces for i in piece) == list(range(1000))
    order = sorted(range(1000), key=lambda i: -len(texts[i]))
    assert pieces[1][: e.BLOCK] == order[e.BLOCK : 2 * e.BLOCK]
    assert max(map(len, pieces)) - min(map(len, pieces)) <= e.BLOCK


def test_the_fastest_settings_are_chosen(monkeypatch):
    monkeypatch.setattr(e, "timed", lambda encode, texts: (encode(texts), torch.zeros(1)))
    candidate = e.Candidate(lambda batch, streams: lambda texts: abs(batch - 32) - streams, (1, 2))
    assert e.best_settings(candidate, ["a"]) == [32, 2]


def test_threads_share_the_texts_and_torch_s_threads():
    seen = []

    def encode(texts):
        seen.append((threading.get_ident(), torch.get_num_threads(), len(texts)))
        return torch.tensor([[float(len(t))] for t in texts])

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        texts = ["x" * ((7 * i) % 13) for i in range(21)]
        found = e.in_threads(encode, 2, texts)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert found.flatten().tolist() == [len(text) for text in texts]
    assert sorted(number for _, _, number in seen) == [10, 11]
    assert {threads for _, threads, _ in seen} == {2}


def candidate(factor: float, seen: list[list[str]]) -> e.Candidate:
    """Its vectors are those of :func:`exact` where ``factor`` is positive."""

    def encode(texts):
        seen.append(list(texts))
        return factor * torch.tensor([[float(len(t)), 1.0] for t in texts])

    return e.Candidate(lambda batch, streams: encode)


def test_a_run_continues_where_it_stopped(tmp_path):
    texts = ["x" * i for i in range(300)]
    exact = torch.tensor([[float(i), 1.0] for i in range(300)])
    state, seen = tmp_path / "state-float32.json", []
    found = {name: candidate(1.0, seen) for name in NAMES}
    progress = e.Progress.read(state, ["key"])
    e.run(progress, state, found, texts, exact, 2, -math.inf)  # no time at all: one choice
    assert list(progress.settings) == [OURS] and not progress.rounds
    progress = e.Progress.read(state, ["key"])
    progress.settings = {key: [32, 1] for key in NAMES}
    progress.rounds = [{name: [1.0, 2.0, 3.0] for name in NAMES}]
    seen.clear()
    e.run(progress, state, found, texts, exact, 2, math.inf)
    assert [len(r[OURS]) for r in progress.rounds] == [e.PIECES, e.PIECES]
    assert len(seen) == 2 * (1 + 1 + e.PIECES)  # the first calls, the fourth piece, a round
    assert torch.equal(e.read_vectors(e.vectors_folder(state), OURS, texts)[-25:], exact[-25:])
    assert e.Progress.read(state, ["key"]) == progress
    assert e.Progress.read(state, ["another key"]) == e.Progress(["another key"])


def test_a_candidate_that_computes_something_else_stops_the_run(tmp_path):
    found = {OURS: candidate(1.0, []), "peer": candidate(-1.0, [])}
    with pytest.raises(WrongResult, match="peer: least cosine -1"):
        progress = e.Progress(["key"], {key: [32, 1] for key in found})
        exact = torch.ones(4, 2)
        exact[:, 0] = 1
        e.run(progress, tmp_path / "s-int8.json", found, ["x"] * 4, exact, 1, math.inf)


def test_rows_add_the_pieces_of_a_round(monkeypatch):
    monkeypatch.setattr(e, "tokens_of", lambda exports, texts: 1000)
    progress = e.Progress(
        ["key"],
        {key: [32, 1] for key in NAMES},
        dict.fromkeys(NAMES, 0.9999),
        [{OURS: [1.0, 1.0], e.DENSE: [2.0, 4.0]}] * 3,
    )
    scores = {name: {"nDCG@10": 0.5} for name in NAMES}
    rows = e.rows_of(progress, "bfloat16", None, ["a"] * 10, {"peer": "not installed"}, scores)
    assert [row.who for row in rows] == [*NAMES, "peer"]
    assert rows[1].ratio.median == 3.0 and rows[1].seconds.median == 6.0
    assert rows[0].figures["tokens per second"] == 500 and rows[1].figures["nDCG@10"] == 0.5
    assert rows[2].reason == "not installed" and rows[2].baseline == OURS


@pytest.mark.slow
def test_a_whole_run_adds_rows_to_a_record(tmp_path, monkeypatch, capsys):
    from bench import runtimes
    from moe_fast.demo import pretrained

    folder = save_sentence_transformer(tmp_path)
    monkeypatch.setattr(pretrained, "pretrained_folder", lambda: folder)
    monkeypatch.setattr(pretrained, "go_offline", lambda: None)
    monkeypatch.setattr(e, "LOCAL", tmp_path / "local")
    monkeypatch.setattr(e, "CALIBRATION", 4)
    monkeypatch.setattr(e, "BLOCK", 2)
    monkeypatch.setattr(e, "BATCHES", (2,))
    monkeypatch.delenv(e.DATA, raising=False)
    monkeypatch.setattr(runtimes.Form, "missing", lambda form: "left out")  # they take minutes
    data, path = tmp_path / "pairs.jsonl", tmp_path / "record.json"
    lines = [{"a": f"w{i}", "b": f"w{i} " * (1 + i)} for i in range(12)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        "--data",
        str(data),
        "--texts",
        "8",
        "--threads",
        "1",
        "--rounds",
        "1",
        "--json",
        str(path),
    ]
    for precision in ("float32", "bfloat16"):
        assert e.main([precision, *words]) == 0
    record = read_record(path)
    assert {row.dtype for row in record.rows} == {"float32", "bfloat16"}
    assert [row.who for row in record.rows if row.ratio] == NAMES * 2
    assert {row.reason for row in record.rows if not row.ratio} == {"left out"}
    assert record.rows[0].figures["nDCG@10 less float32's"] == pytest.approx(0, abs=1e-6)
    assert "4 of 4 pieces are measured" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["float8"], ["int8", "--texts", "0"], ["int8", "--rounds", "0"]])
def test_bad_arguments_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        e.parse(words)
    assert stopped.value.code == 2
    assert words[-1] in capsys.readouterr().err
