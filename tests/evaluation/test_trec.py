from __future__ import annotations

from pathlib import Path

import ir_measures
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast.evaluation import read_run, write_run

IDS = st.text("abcαβ01-_.:", min_size=1, max_size=8)
SCORES = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(IDS, st.dictionaries(IDS, SCORES, min_size=1), min_size=1))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, run: dict) -> None:
    run = {
        query: dict(sorted(hits.items(), key=lambda hit: -hit[1])) for query, hits in run.items()
    }
    path = tmp_path_factory.mktemp("run") / "x.run"
    write_run(run, path)
    found = read_run(path)
    assert found == run
    assert [list(hits) for hits in found.values()] == [list(hits) for hits in run.values()]


def test_the_format_is_trecs(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.run"
    write_run({"q1": {"d2": 0.5, "d1": 0.25}, "q2": {"d1": -1e-9}}, path, tag="mine")
    assert path.read_text() == (
        "q1 Q0 d2 1 0.5 mine\nq1 Q0 d1 2 0.25 mine\nq2 Q0 d1 1 -1e-09 mine\n"
    )
    hits = list(ir_measures.read_trec_run(str(path)))
    assert [(hit.query_id, hit.doc_id, hit.score) for hit in hits] == [
        ("q1", "d2", 0.5), ("q1", "d1", 0.25), ("q2", "d1", -1e-9)
    ]  # fmt: skip


def test_hits_are_put_in_the_order_of_their_scores(tmp_path: Path) -> None:
    path = tmp_path / "x.run"
    path.write_text("q Q0 low 1 0.1 t\n\nq\tQ0\thigh\t2\t0.9\tt\n")
    assert list(read_run(path)["q"].items()) == [("high", 0.9), ("low", 0.1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 d 1 0.5\n", "x.run, line 1: expected 6 columns .* got 5"),
        ("q Q0 d 1 0.5 t\nq Q0 e 2 high t\n", "line 2: the score must be a finite number, got 'hi"),
        ("q Q0 d 1 nan t\n", "line 1: the score must be a finite number, got 'nan'"),
        ("q Q0 d 1 2 t\nq Q0 d 2 1 t\n", "line 2: document 'd' is there twice for query 'q'"),
        ("\n", "no hits in this file"),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.run").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "x.run")


@pytest.mark.parametrize(
    ("run", "tag", "message"),
    [
        ({"a b": {"d": 1.0}}, "t", "query id 'a b'"),
        ({"q": {"": 1.0}}, "t", "document id ''"),
        ({"q": {"d": 1.0}}, "my run", "tag 'my run'"),
        ({"q": {"d": float("nan")}}, "t", "must be finite"),
        ({"q": {"d": 1.0, "e": 2.0}}, "t", "query 'q', document 'e': .* got 2.0 after 1.0"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, run, tag, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_run({"good": {"d": 1.0}} | run, tmp_path / "x.run", tag=tag)
    assert not list(tmp_path.iterdir())
