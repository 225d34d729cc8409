"""The real files that the experiments read; absent from most machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from moe_fast.data import read_pairs, read_retrieval, read_sts, read_texts, split_by

DEFAULT = Path(__file__).parents[3] / "shared" / "data"
FOLDER = Path(os.environ.get("MOE_FAST_SHARED_DATA", DEFAULT))
pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason=f"{FOLDER} is not there (set MOE_FAST_SHARED_DATA)"
)


@pytest.mark.parametrize(
    ("name", "rows", "domains"),
    [
        ("medquad_question_answer", 16_407, 9),
        ("medical_abstracts_title_body", 2_888, 5),
        ("pubmedqa_question_abstract", 1_000, 1),
    ],
)
def test_pairs(name: str, rows: int, domains: int):
    data = read_pairs(FOLDER / f"pairs_{name}.jsonl.gz")
    assert (len(data), len(set(data["domain"]))) == (rows, domains)


def test_medquad_splits_by_focus_and_answer():
    data = read_pairs(FOLDER / "pairs_medquad_question_answer.jsonl.gz", keep=["focus"])
    assert len(set(data["a"])) == 14_979 and len(set(data["b"])) == 15_809
    splits = split_by(data, ["focus", "b"], sizes={"train": 4_000, "test": 1_000})
    assert {name: len(split) for name, split in splits.items()} == {"train": 4_000, "test": 1_000}
    for column in ("focus", "b"):
        assert not set(splits["train"][column]) & set(splits["test"][column])


def test_retrieval():
    data = read_retrieval(FOLDER / "retrieval_pubmedqa.json.gz")
    assert (len(data.corpus), len(data.queries), len(data.qrels)) == (1_000, 1_000, 1_000)


@pytest.mark.parametrize(("split", "rows"), [("train", 5_749), ("dev", 1_500), ("test", 1_379)])
def test_sts(split: str, rows: int):
    data = read_sts(FOLDER / f"stsb-en-{split}.csv.gz")
    assert len(data) == rows
    assert (min(data["score"]), max(data["score"])) == (0.0, 5.0)


def test_texts():
    path = FOLDER / "pairs_medical_abstracts_title_body.jsonl.gz"
    rows = list(read_texts(path, columns=["b"], domain_column="domain"))
    assert [row.id for row in rows] == [str(number) for number in range(2_888)]
    assert len({row.domain for row in rows}) == 5
