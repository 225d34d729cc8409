from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")
from datasets import Dataset

from moe_fast.data import read_flag_rows, read_pairs, write_flag_rows, write_pairs

# any Unicode that is more than white space, but NUL: quotes, line ends, separators ...
_ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXT = st.text(_ANY | st.sampled_from(',"\r\n\u2028\ufeff'), min_size=1).filter(str.strip)
PAIRS = st.lists(
    st.fixed_dictionaries(
        {
            "a": TEXT,
            "b": TEXT,
            "domain": TEXT,
            "label": st.integers(0, 1),
            "focus": st.just("") | TEXT,
        }
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.csv", "p.csv.gz", "p.parquet"])
@given(rows=PAIRS)
def test_pairs_come_back_as_they_were(name: str, rows: list[dict]):
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        assert write_pairs(rows, path) == len(rows)
        assert read_pairs(path, keep=["focus"]).to_list() == rows


@st.composite
def _flag_rows(draw: st.DrawFn) -> list[dict]:
    def row() -> dict:
        texts = draw(st.lists(TEXT, min_size=1, max_size=5, unique=True))
        cut = draw(st.integers(1, len(texts)))
        scores = st.floats(allow_nan=False, allow_infinity=False)
        return {
            "query": draw(TEXT),
            "pos": texts[:cut],
            "neg": texts[cut:],
            "neg_q": [draw(TEXT) for _ in texts[cut:]],
            "pos_scores": [draw(scores) for _ in texts[:cut]],
            "neg_scores": [draw(scores) for _ in texts[cut:]],
        }

    return [row() for _ in range(draw(st.integers(1, 3)))]


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz", "f.parquet"])
@given(rows=_flag_rows())
def test_flag_rows_come_back_as_they_were(name: str, rows: list[dict]):
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        assert write_flag_rows(rows, path) == len(rows)
        assert read_flag_rows(path).to_list() == rows


def test_a_dataset_larger_than_a_batch_is_written(tmp_path: Path):
    data = Dataset.from_dict({"a": [str(i) for i in range(2500)], "b": ["x"] * 2500})
    for name in ("p.parquet", "p.jsonl"):
        assert write_pairs(data, tmp_path / name) == 2500
        assert read_pairs(tmp_path / name).to_list() == data.to_list()


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.csv.gz", "p.parquet"])
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, name: str):
    rows = [{"a": "x", "b": "y"}]
    write_pairs(rows, tmp_path / "one" / name)
    write_pairs(iter(rows), tmp_path / "two" / f"other_{name}")
    assert (tmp_path / "one" / name).read_bytes() == (
        tmp_path / "two" / f"other_{name}"
    ).read_bytes()


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.csv", "p.parquet"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": "x", "b": "y"}] * 1500 + [{"a": "x", "b": ""}], "rows, row 1501: b is empty"),
        ([{"a": "x", "b": "y"}, {"a": "x", "b": "y", "label": 1}], "row 2: columns"),
        ([{"a": "x", "b": "y", "c": ["z"]}], "row 1: a column that is kept must hold text"),
        ([], "rows: no rows"),
    ],
)
def test_after_an_error_the_old_file_is_still_there(
    tmp_path: Path, name: str, rows: list, message: str
):
    (tmp_path / name).write_text("old")
    with pytest.raises(ValueError, match=message):
        write_pairs(rows, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "old"


def test_wrong_names_are_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown format; supported are .jsonl"):
        write_pairs([{"a": "x", "b": "y"}], tmp_path / "p.txt")
    with pytest.raises(ValueError, match="unknown format; supported are .jsonl, .jsonl.gz, .parq"):
        write_flag_rows([{"query": "x", "pos": ["y"]}], tmp_path / "p.csv")
    with pytest.raises(ValueError, match="rows, row 1: a text is in pos and in neg"):
        write_flag_rows([{"query": "x", "pos": ["y"], "neg": ["y"]}], tmp_path / "p.jsonl")
    assert not list(tmp_path.iterdir())
