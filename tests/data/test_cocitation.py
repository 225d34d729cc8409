"""Pairs from a small literature, counted again from the file by plain loops."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs the extra moe-fast[train]")
pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")

from moe_fast.data import cocitation_pairs, read_pairs, write_pairs
from tests.data.files import write_jsonl

HALVES = (0.5, 0.25, 0.25)


def _literature(seed: int, papers: int = 90, domains: bool = True) -> list[dict[str, Any]]:
    """Papers that cite near ones; half of the links are said by the citing side, half by the other.

    Some links lead out of the file, some papers cite themselves, one cites thirty others.
    """
    rng = np.random.default_rng(seed)
    rows = [
        {"id": f"p{i}", "abstract": f"abstract {i}", "citing": [], "cited_by": []}
        for i in range(papers)
    ]
    for i in range(papers):
        for j in {int(k) for k in i + rng.integers(-9, 10, size=8)} | {i} & set(range(0, 90, 17)):
            if not 0 <= j < papers or rng.random() < 0.5:
                rows[i]["citing"].append(f"p{j}")
            else:
                rows[j]["cited_by"].append(f"p{i}")
    rows[3]["citing"] = [f"p{i}" for i in range(10, 40)]
    for i, row in enumerate(rows):
        if domains:
            row["domain"] = "xy"[i // 45 % 2]
    return rows


def _links(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    said = {(row["id"], other) for row in rows for other in row["citing"]}
    said |= {(other, row["id"]) for row in rows for other in row["cited_by"]}
    known = {row["id"] for row in rows}
    return {(i, j) for i, j in said if i != j and {i, j} <= known}


def _together(rows: list[dict[str, Any]], most: int = 10**9) -> dict[frozenset[str], int]:
    """How many papers cite each pair; those that cite more than `most` do not count."""
    counts: dict[frozenset[str], int] = {}
    for row in rows:
        cited = [j for i, j in _links(rows) if i == row["id"]]
        for pair in combinations(cited, 2) if len(cited) <= most else ():
            counts[frozenset(pair)] = counts.get(frozenset(pair), 0) + 1
    return counts


def _pairs(data: Any, label: int | None) -> set[frozenset[str]]:
    rows = [row for row in data if label is None or row["label"] == label]
    pairs = {frozenset((row["a_id"], row["b_id"])) for row in rows}
    assert len(pairs) == len(rows) and all(len(pair) == 2 for pair in pairs)
    return pairs


@settings(max_examples=15)
@given(
    st.integers(0, 10**6),
    st.integers(1, 2),
    st.integers(0, 3),
    st.sampled_from([None, 12]),
    st.booleans(),
)
def test_against_plain_loops(tmp_path_factory, seed, least, per_positive, most, domains):
    rows = _literature(seed, domains=domains)
    path = write_jsonl(tmp_path_factory.mktemp("papers") / "papers.jsonl", rows)
    try:
        made = cocitation_pairs(
            path,
            min_cocitations=least,
            negatives_per_positive=per_positive,
            fractions=HALVES,
            max_references=most,
            ids=True,
            seed=seed,
        )
    except ValueError as error:  # few papers: now and then a quarter of them holds no pair
        assert "gets no pair" in str(error)
        reject()
    domain_of = {row["id"]: row.get("domain") for row in rows}
    text_of = {row["id"]: row["abstract"] for row in rows}
    counts = _together(rows, most or 10**9)
    cocited = {pair for pair, count in counts.items() if count >= least}
    same_domain = {pair for pair in cocited if len({domain_of[p] for p in pair}) == 1}
    linked = {frozenset(link) for link in _links(rows)} | set(_together(rows))
    report = made.report
    assert report.cocited == len(cocited)
    assert report.across_domains == len(cocited) - len(same_domain)
    assert (report.links, report.rows) == (len(_links(rows)), len(rows))

    papers: list[set[str]] = []
    found = 0
    for name, data in made.splits.items():
        positives = _pairs(data, 1 if per_positive else None)
        assert positives <= same_domain
        negatives = _pairs(data, 0) if per_positive else set()
        assert not negatives & linked
        assert {name: len(positives)}.items() <= report.positives.items()
        assert {name: len(negatives)}.items() <= report.negatives.items()
        assert ("label" in data.column_names) == (per_positive > 0)
        for row in data:
            assert row["a"] == text_of[row["a_id"]] and row["b"] == text_of[row["b_id"]]
            assert domain_of[row["a_id"]] == domain_of[row["b_id"]] == row.get("domain")
        papers.append(set().union(*positives, *negatives))
        # no positive is forgotten whose papers are both known to be in this split
        assert {pair for pair in same_domain if pair <= papers[-1]} == positives
        found += len(positives)
    assert sum(map(len, papers)) == len(set().union(*papers)), "a paper is in two splits"
    assert found + report.across_splits == len(same_domain)
    asked = found * per_positive
    assert sum(report.negatives.values()) + report.negatives_missing == asked


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "papers.jsonl", _literature(0))


def _rows(path: Path, **arguments: Any) -> dict[str, list[dict[str, Any]]]:
    arguments = {"fractions": HALVES, **arguments}
    made = cocitation_pairs(path, **arguments)
    return {name: data.to_list() for name, data in made.splits.items()}


def test_the_seed_decides(papers: Path):
    assert _rows(papers, seed=1) == _rows(papers, seed=1) != _rows(papers, seed=2)


def test_papers_are_divided_domain_by_domain(papers: Path):
    made = cocitation_pairs(papers, fractions=HALVES)
    # 45 papers in each domain: 22 or 23, 11 or 12, 11 or 12, the same in both
    assert set(made.report.papers_per_split) == {"train", "dev", "test"}
    assert sum(made.report.papers_per_split.values()) == 90
    assert all(count % 2 == 0 for count in made.report.papers_per_split.values())


def test_the_drawn_order_of_a_pair_is_random(papers: Path):
    [rows] = _rows(papers, fractions=(1, 0, 0), ids=True).values()
    forward = np.mean([int(row["a_id"][1:]) < int(row["b_id"][1:]) for row in rows if row["label"]])
    assert 0.4 < forward < 0.6


def test_max_pairs_draws_some(papers: Path):
    everything = cocitation_pairs(papers, fractions=(1, 0, 0))
    total = everything.report.positives["train"]
    some = cocitation_pairs(papers, fractions=(1, 0, 0), max_pairs=20)
    assert list(some.splits) == ["train"]
    assert (some.report.positives["train"], some.report.not_drawn) == (20, total - 20)
    assert len(some.splits["train"]) == 40
    unbounded = cocitation_pairs(papers, fractions=(1, 0, 0), max_pairs=total)
    assert unbounded.report == everything.report


def test_surveys_are_passed_over_but_their_links_are_links(tmp_path: Path):
    """s cites p, q, r together; u cites p and q. With s left out only p, q are co-cited."""
    names = {"s": ["p", "q", "r"], "u": ["p", "q"]}
    rows = [{"id": i, "abstract": i, "citing": names.get(i, [])} for i in "pqrsuv"]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    made = cocitation_pairs(
        path, fractions=(1, 0, 0), max_references=2, negatives_per_positive=9, ids=True
    )
    [data] = made.splits.values()
    assert _pairs(data, 1) == {frozenset("pq")}
    assert made.report.passed_over == 1
    [first] = {row["a_id"] for row in data}
    # p and q are both linked to r, through s, and to s and u, which cite them: v alone is free
    assert _pairs(data, 0) == {frozenset((first, "v"))}
    assert made.report.negatives_missing == 8


def test_what_is_written_is_read_back(papers: Path, tmp_path: Path):
    data = cocitation_pairs(papers, fractions=HALVES, ids=True).splits["train"]
    write_pairs(data, tmp_path / "train.parquet")
    plain = data.remove_columns(["a_id", "b_id"])
    assert read_pairs(tmp_path / "train.parquet").to_list() == plain.to_list()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_cocitations": 0}, "min_cocitations must be at least 1; got 0"),
        ({"negatives_per_positive": -1}, "negatives_per_positive must be at least 0; got -1"),
        ({"max_references": 1}, "max_references must be at least 2; got 1"),
        ({"max_pairs": 0}, "max_pairs must be at least 1; got 0"),
        ({"fractions": (0.8, 0.2)}, r"fractions must be three.*got \(0.8, 0.2\)"),
        ({"fractions": (0.8, 0.2, 0.2)}, "fractions must .* add up to 1"),
        ({"min_cocitations": 50}, "no two papers are cited together by min_cocitations=50"),
        (
            {"fractions": (0.98, 0.01, 0.01)},
            r"split 'dev' gets no pair: of \d+ co-cited pairs \d+ are of two domains",
        ),
    ],
)
def test_mistakes(papers: Path, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        cocitation_pairs(papers, **arguments)
