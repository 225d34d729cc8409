from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="needs the extra moe-fast[train]")
pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from moe_fast.data.papers import read_papers
from tests.data.files import write, write_jsonl, write_parquet

# p cites q (said by both) and the absent z, q cites r (said by r alone), r cites itself
ROWS = [
    {"id": "p", "abstract": "P", "citing": ["q", "q", "z"], "cited_by": ["y"], "domain": "x"},
    {"id": "q", "abstract": "Q", "citing": [], "cited_by": ["p"], "domain": "x"},
    {"id": "r", "abstract": "R", "citing": ["r"], "cited_by": ["q", "r"], "domain": "y"},
]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.parquet"])
def test_a_link_counts_where_either_end_names_it_and_once(tmp_path: Path, name: str):
    write_rows = write_parquet if name.endswith("parquet") else write_jsonl
    papers = read_papers(write_rows(tmp_path / name, ROWS))
    assert papers.ids == ["p", "q", "r"]
    assert papers.abstracts == ["P", "Q", "R"]
    assert papers.domains == ["x", "x", "y"]
    assert papers.citations.toarray().tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert (papers.rows, papers.links_outside, papers.self_citations) == (3, 2, 1)


@pytest.mark.parametrize("delimiter", [None, ";"])
def test_cells_hold_ids_parted_by_space_or_a_json_list(tmp_path: Path, delimiter: str | None):
    lines = ["id;abstract;citing;cited_by;domain", 'p;P;q  q z;"[""y""]";x', "q;Q;[];p;x"]
    path = write(tmp_path / "p.csv", "\n".join([*lines, "r;R;r;q r;y"]) + "\n")
    papers = read_papers(path, delimiter=delimiter)
    assert papers.citations.toarray().tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert (papers.rows, papers.links_outside, papers.self_citations) == (3, 2, 1)
    write(path, "\n".join([*lines, "r;R;[r;q;y"]) + "\n")
    with pytest.raises(ValueError, match=r"line 4: citing is no JSON list of ids"):
        read_papers(path)
    with pytest.raises(ValueError, match=r"delimiter=';': .* is no CSV file"):
        read_papers(write_jsonl(tmp_path / "p.jsonl", ROWS), delimiter=";")


def test_papers_with_the_same_abstract_are_one(tmp_path: Path):
    rows = [
        {"id": "p", "abstract": "P", "citing": ["q"], "domain": "x"},
        {"id": "q", "abstract": "Q", "citing": ["p2"], "domain": "x"},
        {"id": "p2", "abstract": "P", "citing": ["p", "q", "s"], "domain": "y"},
        {"id": "s", "abstract": "S", "citing": [], "domain": "y"},
    ]
    papers = read_papers(write_jsonl(tmp_path / "p.jsonl", rows))
    assert papers.ids == ["p", "q", "s"]
    assert papers.domains == ["x", "x", "y"]
    assert papers.citations.toarray().tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert (papers.rows, papers.self_citations) == (4, 1)


def test_one_direction_is_enough_and_domains_may_be_absent(tmp_path: Path):
    rows = [{"id": "p", "text": "P", "cited_by": []}, {"id": "q", "text": "Q", "cited_by": ["p"]}]
    papers = read_papers(write_jsonl(tmp_path / "p.jsonl", rows), columns={"abstract": "text"})
    assert papers.domains is None
    assert papers.citations.toarray().tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            '{"id": "p", "abstract": "P", "citing": []}\n'
            '{"id": "q", "abstract": "Q", "citing": []}\n'
            '{"id": "p", "abstract": "R", "citing": []}',
            r"line 3: id 'p' was given before, .*p\.jsonl, line 1",
        ),
        ('{"id": "p", "abstract": "P"}', "line 1: columns 'citing' and 'cited_by' are both missin"),
        ('{"id": 1.0, "abstract": "P", "citing": []}', "id must be text or a whole number, got fl"),
        ('{"id": "p", "abstract": "P", "citing": [true]}', r"citing\[0\] must be text or a whole"),
        ('{"id": "p", "abstract": "P", "citing": null}', "'citing' and 'cited_by' are both missin"),
        ('{"id": "p", "abstract": "P", "citing": "q"}', "line 1: citing must be a list, got str"),
        ('{"id": "p", "abstract": " ", "citing": []}', "line 1: abstract is empty"),
        ('{"id": "p", "citing": []}', "line 1: column 'abstract' is missing"),
        (
            '{"id": "p", "abstract": "P", "citing": [], "domain": "x"}\n'
            '{"id": "q", "abstract": "Q", "citing": []}',
            "line 2: domain must be in every row or in none",
        ),
        (
            '{"id": "p", "abstract": "P", "citing": []}\n'
            '{"id": "q", "abstract": "Q", "citing": [], "domain": "x"}',
            "line 2: domain must be in every row or in none",
        ),
        ("", "no rows"),
    ],
)
def test_mistakes(tmp_path: Path, lines: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_papers(write(tmp_path / "p.jsonl", lines))
