from __future__ import annotations

from pathlib import Path

import ir_measures
import pytest

from moe_fast.data import read_qrels
from tests.data.files import write

THREE = "query-id\tcorpus-id\tscore\nq1\td 1\t1\nq2\td2\t0\n"
FOUR = "q1 Q0 d1#0 1\nq2\t0\td2\t0\n\nq1 Q0 d2 3\n"


def test_both_kinds_of_files(tmp_path: Path):
    assert read_qrels(write(tmp_path / "a.tsv", THREE)) == {"q1": {"d 1": 1}, "q2": {"d2": 0}}
    path = write(tmp_path / "b.qrels", FOUR)
    found = read_qrels(path)
    assert found == {"q1": {"d1#0": 1, "d2": 3}, "q2": {"d2": 0}}
    theirs = {(r.query_id, r.doc_id, r.relevance) for r in ir_measures.read_trec_qrels(str(path))}
    assert theirs == {(q, d, r) for q, row in found.items() for d, r in row.items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FOUR + "q3 d1 1\n", "line 5: 3 columns; expected query id, Q0, document id, relevance"),
        (THREE + "q3 Q0 d1 1\n", "line 4: 1 cells between tabs; expected"),
        ("q1 Q0 d1 x\n", "line 1: relevance must be a whole number"),
        (FOUR + "q1 Q0 d2 3\n", "line 5: query 'q1' and document 'd2' were judged before"),
        ("query-id\tcorpus-id\tscore\n", "no judgements"),
    ],
)
def test_mistakes_are_named_with_the_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_qrels(write(tmp_path / "x.tsv", text))
