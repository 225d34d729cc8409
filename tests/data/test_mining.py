"""Hard negatives against a brute-force ranking; every filter; what the rows carry along."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")
pytest.importorskip("sklearn", reason="needs the extra moe-fast[eval]")

from moe_fast.data import (
    MiningSettings,
    mine_hard_negatives,
    read_flag_rows,
    write_flag_rows,
)
from moe_fast.data.mining import plain


class Model:
    """Gives each text the vector that it is told."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors
        self.domains: list[list[str] | None] = []

    def encode(self, texts, domain=None, **options):
        self.domains.append(domain)
        return np.array([self.vectors[text] for text in texts])


def random_model(texts, seed: int, dim: int = 4) -> Model:
    rng = np.random.default_rng(seed)
    return Model({text: rng.standard_normal(dim).tolist() for text in texts})


def mine(rows, retriever, corpus=(), **wanted):
    wanted = {"max_ratio": None} | wanted
    return mine_hard_negatives(rows, retriever, settings=MiningSettings(**wanted), corpus=corpus)


# --- against brute force -------------------------------------------------------------------------


def oracle(rows, model, corpus, num, depth, skip, ratio, margin) -> list[list[str]]:
    """Rank everything that is no positive of the query, then filter."""

    def unit(text):
        vector = np.array(model.vectors[text])
        return vector / np.linalg.norm(vector)

    documents = list(dict.fromkeys([d for row in rows for d in row["pos"]] + list(corpus)))
    result = []
    for row in rows:
        answers = {d for other in rows if other["query"] == row["query"] for d in other["pos"]}
        scores = {d: float(unit(row["query"]) @ unit(d)) for d in documents}
        best = max(scores[d] for d in row["pos"])
        limit = ratio * best if ratio is not None and best > 0 else np.inf
        limit = limit if margin is None else min(limit, best - margin)
        ranked = sorted((d for d in documents if d not in answers), key=lambda d: -scores[d])
        kept = [d for d in ranked[skip:depth] if d != row["query"] and scores[d] <= limit]
        result.append(kept[:num])
    return result


NAMES = st.sampled_from([f"q{i}" for i in range(6)])
DOCUMENTS = st.sampled_from([f"d{i}" for i in range(9)] + ["q0", "q1"])


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(NAMES, st.lists(DOCUMENTS, min_size=1, max_size=3, unique=True)),
        min_size=2,
        max_size=8,
    ),
    corpus=st.lists(st.sampled_from(["c0", "c1", "c2", "d3"]), max_size=3),
    num=st.integers(1, 4),
    depth=st.integers(2, 12),
    skip=st.integers(0, 1),
    ratio=st.sampled_from([None, 0.5, 0.95, 1.5]),
    margin=st.sampled_from([None, 0.1, -0.2]),
    seed=st.integers(0, 1000),
)
def test_is_brute_force(rows, corpus, num, depth, skip, ratio, margin, seed):
    rows = [{"query": query, "pos": documents} for query, documents in rows]
    model = random_model([f"{kind}{i}" for kind in "qdc" for i in range(9)], seed)
    expected = oracle(rows, model, corpus, num, depth, skip, ratio, margin)
    options = {"num_negatives": num, "depth": depth, "skip": skip}
    if not any(expected):
        with pytest.raises(ValueError, match="no row has a negative left"):
            mine(rows, model, corpus, max_ratio=ratio, margin=margin, **options)
        return
    mined = mine(rows, model, corpus, max_ratio=ratio, margin=margin, **options)
    wanted = [
        (row["query"], row["pos"], negatives)
        for row, negatives in zip(rows, expected, strict=True)
        if negatives
    ]
    assert [(row["query"], row["pos"], row["neg"]) for row in mined.rows] == wanted
    report = mined.report
    assert (report.rows, report.lost_rows) == (len(wanted), len(rows) - len(wanted))
    assert report.negatives == sum(len(negatives) for *_, negatives in wanted)
    assert report.short_rows == sum(len(negatives) < num for *_, negatives in wanted)


# --- filters -------------------------------------------------------------------------------------

FLAT = Model({text: [1.0, 0.1 * n] for n, text in enumerate("abcdefghij")})


def pairs(*texts: str, **columns: list) -> list[dict]:
    """``"ab"``: query a, positive b."""
    rows = [{"a": text[0], "b": text[1]} for text in texts]
    return [row | {n: v[i] for n, v in columns.items()} for i, row in enumerate(rows)]


def negatives_of(mined) -> dict[str, str]:
    return {row["query"]: "".join(sorted(row["neg"])) for row in mined.rows}


def test_a_positive_of_the_same_query_in_another_row():
    found = mine(pairs("ab", "ac", "de"), FLAT)
    assert negatives_of(found) == {"a": "e", "d": "bc"}
    assert found.report.left_out["positive"] == 2 + 2 + 1


def test_texts_that_differ_in_case_and_white_space_alone():
    rows = [
        {"a": "q", "b": "An  Answer"},
        {"a": "r", "b": "an answer\n"},
        {"a": "s", "b": "Q"},
        {"a": "t", "b": "other"},
    ]
    model = random_model([text for row in rows for text in row.values()], seed=0)
    found = mine(rows, model)
    assert found.report.documents == 3
    assert {row["query"]: sorted(row["neg"]) for row in found.rows} == {
        "q": ["other"],  # its own text is none
        "r": ["Q", "other"],
        "s": ["An  Answer", "other"],
        "t": ["An  Answer", "Q"],
    }
    assert found.report.left_out["same_text"] == 1
    assert plain(" An\t answer ") == plain("an ANSWER")


def test_groups():
    rows = pairs("ab", "cd", "ef", "gd", topic=["x", "x", "y", "y"])
    found = mine(rows, FLAT, group="topic")
    # d answers c (of x) and g (of y): no negative for either group
    assert negatives_of(found) == {"a": "f", "c": "f", "e": "b", "g": "b"}
    assert found.report.left_out["group"] == 4
    assert [row["topic"] for row in found.rows] == ["x", "x", "y", "y"]


def test_domains():
    rows = pairs("ab", "cd", "ef", domain=["law", "law", "art"])
    found = mine(rows, FLAT, same_domain=True)
    assert negatives_of(found) == {"a": "d", "c": "b"}
    assert found.report.lost_rows == 1
    assert [row["domain"] for row in found.rows] == ["law", "law"]
    with pytest.raises(ValueError, match="row 1: same_domain needs a column 'domain'"):
        mine(pairs("ab"), FLAT, same_domain=True)


def test_each_texts_domain_goes_to_a_model_that_knows_domains():
    model = Model(FLAT.vectors)
    model.transformers_model = type("Encoder", (), {})()
    model.transformers_model.config = type("Config", (), {"domains": ["law", "art"]})()
    rows = pairs("ab", "cd", "ef", domain=["law", "law", "art"])
    mine(rows, model)
    assert model.domains == [["law", "law", "art"]] * 2
    with pytest.raises(ValueError, match="which the texts of a corpus do not have"):
        mine(rows, model, corpus=["g"])
    mine(pairs("ab", "cd"), model)
    assert model.domains[-1] is None


def test_the_margin_is_below_the_best_positive():
    angle = {"q": 0.0, "p1": 0.5, "p2": 1.0, "x": 0.3, "y": 0.6, "z": 1.2}
    model = Model({text: [np.cos(a), np.sin(a)] for text, a in angle.items()})
    rows = [{"query": "q", "pos": ["p1", "p2"]}]
    best = np.cos(0.5)
    assert mine(rows, model, corpus=["x", "y", "z"], margin=0.0).rows[0]["neg"] == ["y", "z"]
    tight = best - np.cos(0.6) + 1e-6
    assert mine(rows, model, corpus=["x", "y", "z"], margin=tight).rows[0]["neg"] == ["z"]
    share = np.cos(0.6) / best
    for ratio, expected in ((share + 1e-6, ["y", "z"]), (share - 1e-6, ["z"])):
        found = mine(rows, model, corpus=["x", "y", "z"], max_ratio=ratio)
        assert found.rows[0]["neg"] == expected
        assert found.report.left_out["margin"] == 3 - len(expected)


def test_a_draw_is_of_the_seed_and_the_row():
    rows = pairs("ab", "cd", "ef", "gh", "ij")
    draws = {
        seed: negatives_of(mine(rows, FLAT, num_negatives=2, sample=True, seed=seed))
        for seed in range(8)
    }
    assert draws[0] == negatives_of(mine(rows, FLAT, num_negatives=2, sample=True, seed=0))
    assert draws[0]["e"] == negatives_of(mine(rows[::-1], FLAT, num_negatives=2, sample=True))["e"]
    assert len({tuple(draw.values()) for draw in draws.values()}) > 4
    assert all(len(n) == 2 for draw in draws.values() for n in draw.values())


# --- the rows ------------------------------------------------------------------------------------


def test_each_negatives_own_query_goes_with_it():
    found = mine(pairs("ab", "cd", "ed"), FLAT)
    own = {"b": "a", "d": "c"}  # the first row's
    for row in found.rows:
        assert row["neg_q"] == [own[text] for text in row["neg"]]
    found = mine(pairs("ab", "cd"), FLAT, corpus=["e"])
    assert all("neg_q" not in row for row in found.rows)  # nobody knows what e answers
    found = mine(pairs("ab", "cd"), FLAT, corpus=["e"], known_queries=True)
    assert [row["neg_q"] for row in found.rows] == [["c"], ["a"]]
    assert found.report.left_out["no_query"] == 2


def test_the_readers_take_them_back(tmp_path):
    rows = pairs("ab", "cd", "ef", domain=["law", "law", "art"], topic=["x", "y", "z"])
    mined = mine(rows, FLAT, group="topic").rows
    assert write_flag_rows(mined, tmp_path / "mined.jsonl") == 3
    assert read_flag_rows(tmp_path / "mined.jsonl", keep=["topic"]).to_list() == mined


# --- BM25 ----------------------------------------------------------------------------------------

DOCUMENT_TEXTS = [
    "the red fox runs",
    "a red fox sleeps all day",
    "blue whales sing",
    "day and night",
]


def bm25_score(query: str, document: str, documents: list[str]) -> float:
    """Lucene's form with k1 = 1.5, b = .75."""

    def split(text):
        return re.findall(r"\w+", text.lower())

    mean = sum(len(split(d)) for d in documents) / len(documents)
    own, total = split(document), 0.0
    for word in split(query):
        n = sum(word in split(d) for d in documents)
        if n:
            idf = np.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            count = own.count(word)
            total += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(own) / mean))
    return total


def test_bm25_is_the_formula():
    pytest.importorskip("bm25s")
    queries = ["red fox day", "whales", "the night", "zebra"]
    rows = [{"a": q, "b": d} for q, d in zip(queries, DOCUMENT_TEXTS, strict=True)]
    found = mine(rows, "bm25")
    assert [row["query"] for row in found.rows] == ["red fox day", "whales", "the night"]
    for row in found.rows:
        rest = [d for d in DOCUMENT_TEXTS if d not in row["pos"]]
        scores = [bm25_score(row["query"], d, DOCUMENT_TEXTS) for d in rest]
        order = sorted(range(3), key=lambda i: -scores[i])
        assert row["neg"] == [rest[i] for i in order if scores[i] > 0]
    found = mine(rows, "bm25", max_ratio=0.95)
    first = next(row for row in found.rows if row["query"] == queries[0])
    own = bm25_score(queries[0], DOCUMENT_TEXTS[0], DOCUMENT_TEXTS)
    rest = DOCUMENT_TEXTS[1:]
    assert set(first["neg"]) == {
        d for d in rest if 0 < bm25_score(queries[0], d, DOCUMENT_TEXTS) <= 0.95 * own
    }


def test_what_shares_no_word_with_the_query_is_no_hard_negative():
    pytest.importorskip("bm25s")
    found = mine([{"a": "?", "b": "red fox"}, {"a": "fox", "b": "whale song"}], "bm25")
    assert [(row["query"], row["neg"]) for row in found.rows] == [("fox", ["red fox"])]
    assert found.report.left_out["no_word"] == 1 and found.report.lost_rows == 1
    with pytest.raises(ValueError, match="no row has a negative left"):
        mine([{"a": "?", "b": "!"}, {"a": "...", "b": "--"}], "bm25")


def test_bm25_of_scripts_without_spaces_and_words_of_one_letter():
    pytest.importorskip("bm25s")
    rows = [
        {"a": "机器学习是什么", "b": "一种算法"},
        {"a": "深度学习", "b": "机器学习的一部分"},
        {"a": "การเรียนรู้", "b": "ระบบ"},
        {"a": "x", "b": "เครื่องเรียน"},
        {"a": "in R", "b": "a vector"},
        {"a": "in C", "b": "R has vectors"},
    ]
    found = {row["query"]: row["neg"] for row in mine(rows, "bm25").rows}
    assert found == {
        "机器学习是什么": ["机器学习的一部分"],
        "การเรียนรู้": ["เครื่องเรียน"],
        "in R": ["R has vectors"],
    }


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        ([{"a": "x", "c": "y"}], "row 1: column 'b' is missing"),
        ([{"a": "x", "b": " "}], "row 1: b is empty"),
        ([{"query": "x", "pos": []}], "row 1: pos is an empty list"),
        ([{"query": "x", "pos": ["y"], "neg": ["z"]}], "row 1: it has negatives already"),
        ([{"a": "x", "b": "y", "negative_1": "z"}], "row 1: it has negatives already"),
        ([{"a": "x", "b": "y", "label": 0}], "row 1: label is 0"),
        ([{"a": "a", "b": "b", "domain": "x"}, {"a": "c", "b": "d"}], "'domain' must be in every"),
        ([{"a": "a", "b": "b"}], "no row has a negative left"),
    ],
)
def test_bad_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=message):
        mine(rows, FLAT)


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ({"num_negatives": 0}, ValueError, "num_negatives must be at least 1"),
        ({"depth": 2.5}, TypeError, "depth must be an int"),
        ({"skip": 5, "depth": 5}, ValueError, "skip must be less than depth = 5; got 5"),
        ({"max_ratio": 0.0}, ValueError, "max_ratio must be positive"),
        ({"margin": float("nan")}, ValueError, "margin must be finite"),
        ({"group": "topic"}, ValueError, "row 1: column 'topic' is missing"),
    ],
)
def test_bad_settings_are_named(wanted, error, message):
    with pytest.raises(error, match=message):
        mine(pairs("ab", "cd"), FLAT, **wanted)


def test_unknown_retrievers_and_bad_corpora_are_named():
    with pytest.raises(ValueError, match="retriever must be a model or 'bm25'; got 'tfidf'"):
        mine(pairs("ab", "cd"), "tfidf")
    with pytest.raises(ValueError, match="corpus, text 2: text is empty"):
        mine(pairs("ab", "cd"), FLAT, corpus=["e", ""])


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(ImportError, match=r"mining needs bm25s.*\[search\]"):
        mine(pairs("ab", "cd"), "bm25")
