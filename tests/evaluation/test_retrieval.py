from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace

import ir_measures
import numpy as np
import pytest
import sklearn.metrics

from moe_fast.data import Retrieval
from moe_fast.evaluation import (
    Bootstrap,
    EncodeOptions,
    TfidfEncoder,
    compare,
    evaluate_retrieval,
    evaluate_run,
    read_run,
    retrieve,
    search,
    write_run,
)
from moe_fast.evaluation.bootstrap import bootstrap_bounds
from moe_fast.evaluation.retrieval import MEASURES, QueryItems
from tests.evaluation.fakes import TableEncoder

NONE = Bootstrap(resamples=0)


def _vectors(rows: int, seed: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def _scores(queries, documents, qrels, measures=MEASURES) -> dict[str, np.ndarray]:
    """Of an exact search; documents and queries go by their numbers."""
    _, hits = search(queries, documents, k=len(documents))
    run = {f"q{q}": {f"d{d}": -float(r) for r, d in enumerate(row)} for q, row in enumerate(hits)}
    data = Retrieval(
        corpus={f"d{d}": "text" for d in range(len(documents))},
        queries=dict.fromkeys(run, "text"),
        qrels={f"q{q}": {f"d{d}": r for d, r in row.items()} for q, row in enumerate(qrels)},
    )
    return evaluate_run(run, data, measures=measures, bootstrap=NONE).items.scores


def _ranked_at(*positions: int, documents: int = 20) -> tuple[np.ndarray, np.ndarray, list]:
    """Queries whose only relevant document stands at the given place (1-based)."""
    # the i-th document scores -i, so that document p - 1 is at place p
    vectors = -np.arange(documents, dtype=np.float32)[:, None]
    return np.ones((len(positions), 1), np.float32), vectors, [{p - 1: 1} for p in positions]


def test_metrics_by_hand() -> None:
    scores = _scores(*_ranked_at(1, 2, 3, 10, 11))
    np.testing.assert_allclose(
        scores["nDCG@10"], [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(11), 0], rtol=1e-6
    )
    np.testing.assert_allclose(scores["MRR@10"], [1, 1 / 2, 1 / 3, 1 / 10, 0], rtol=1e-6)
    np.testing.assert_allclose(scores["Recall@10"], [1, 1, 1, 1, 0])


def test_several_relevant_documents_by_hand() -> None:
    queries, documents, _ = _ranked_at(1)
    scores = _scores(
        queries, documents, [{0: 1, 3: 1, 15: 1, 1: 0}], measures=["nDCG@5", "Recall@5", "MAP@5"]
    )
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    np.testing.assert_allclose(scores["nDCG@5"], [(1 + 1 / math.log2(5)) / ideal], rtol=1e-6)
    np.testing.assert_allclose(scores["Recall@5"], [2 / 3], rtol=1e-6)
    np.testing.assert_allclose(scores["MAP@5"], [(1 + 2 / 4) / 3], rtol=1e-6)


def test_ndcg_equals_scikit_learns() -> None:
    queries, documents = _vectors(30, 4), _vectors(40, 5)
    grades = np.random.default_rng(6).integers(0, 3, size=(30, 40))
    qrels = [{int(d): int(grade) for d, grade in enumerate(row)} for row in grades]
    found = _scores(queries, documents, qrels, measures=["nDCG@10"])["nDCG@10"]
    expected = [
        sklearn.metrics.ndcg_score(grades[i : i + 1], (queries @ documents.T)[i : i + 1], k=10)
        for i in range(30)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_ties_are_scored_in_the_order_of_search() -> None:
    queries, documents = np.ones((2, 1), np.float32), np.ones((30, 1), np.float32)
    scores = _scores(queries, documents, [{0: 1}, {12: 1}])
    assert scores["MRR@10"].tolist() == [1.0, 0.0]
    assert scores["nDCG@10"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("qrels", "measures", "message"),
    [
        ([{0: 1}], ["nDCG"], "unknown measure 'nDCG'; allowed are nDCG@k, MRR@k"),
        ([{0: 1}], ["F1@3"], "unknown measure 'F1@3'"),
        ([{0: 1}], ["nDCG@0"], "k >= 1"),
    ],
)
def test_bad_measures(qrels: list, measures: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _scores(_vectors(1, 0), _vectors(5, 1), qrels, measures=measures)


# --- a model on a corpus ------------------------------------------------------------------------


def _retrieval(queries: int = 20, documents: int = 30, domains: bool = True) -> Retrieval:
    rng = np.random.default_rng(0)
    return Retrieval(
        corpus={f"d{i}": f"document {i}" for i in range(documents)},
        queries={f"q{i}": f"query {i}" for i in range(queries)},
        qrels={f"q{i}": {f"d{j}": 1 for j in rng.choice(documents, 3)} for i in range(queries)},
        domains={f"q{i}": "xy"[i % 2] for i in range(queries)} if domains else None,
    )


def _model(retrieval: Retrieval, noise: float = 1.0) -> TableEncoder:
    """Queries lie near the documents they ask for."""
    model, rng = TableEncoder(width=12), np.random.default_rng(1)
    for query, judged in retrieval.qrels.items():
        near = np.sum([model.vector(retrieval.corpus[d]) for d in judged], axis=0)
        model.table[retrieval.queries[query]] = near + noise * rng.normal(size=model.width)
    return model


MEASURES = ("nDCG@5", "MRR@10", "Recall@7", "MAP")


def test_the_numbers_are_those_of_ir_measures_on_all_cosines() -> None:
    data = _retrieval()
    model = _model(data)
    found = evaluate_retrieval(model, data, measures=MEASURES, bootstrap=NONE)
    run = {
        query: {d: model.cosine(text, other) for d, other in data.corpus.items()}
        for query, text in data.queries.items()
    }
    for ours, theirs in zip(MEASURES, ("nDCG@5", "RR@10", "R@7", "AP"), strict=True):
        measure = ir_measures.parse_measure(theirs)
        values = {m.query_id: m.value for m in measure.iter_calc(data.qrels, run)}
        for group in ("x", "y", "all"):
            of_group = [v for q, v in values.items() if group in ("all", data.domains[q])]
            assert found.scores[group][ours].value == pytest.approx(np.mean(of_group))
    sizes = {group: numbers["queries"] for group, numbers in found.details.items()}
    assert sizes == {"x": 10, "y": 10, "all": 20}
    assert found.settings["documents"] == 30 and found.settings["depth"] == 1000


def test_the_numbers_of_sentence_transformers_evaluator(tmp_path) -> None:
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    from sentence_transformers import SentenceTransformer

    from tests.models.tiny import save_sentence_transformer

    model = SentenceTransformer(save_sentence_transformer(tmp_path), device="cpu")
    rng = random.Random(0)
    data = _retrieval(domains=False)
    for texts in (data.corpus, data.queries):
        for key in texts:
            texts[key] = " ".join(f"w{rng.randrange(54)}" for _ in range(6))
    relevant = {query: set(judged) for query, judged in data.qrels.items()}
    theirs = evaluation.InformationRetrievalEvaluator(
        data.queries, data.corpus, relevant, score_functions={"cosine": model.similarity},
        mrr_at_k=[10], ndcg_at_k=[5], precision_recall_at_k=[7], map_at_k=[100],
    )(model)  # fmt: skip
    measures = {
        "nDCG@5": "cosine_ndcg@5", "MRR@10": "cosine_mrr@10", "Recall@7": "cosine_recall@7",
        "MAP@100": "cosine_map@100",
    }  # fmt: skip
    found = evaluate_retrieval(model, data, measures=list(measures), bootstrap=NONE)
    assert found.settings["encode"]["roles"] is True  # they use the model's prompts, too
    for ours, name in measures.items():
        assert found.scores["all"][ours].value == pytest.approx(theirs[name], abs=1e-6), ours


def test_the_run_gives_the_same_numbers_after_a_trip_through_a_file(tmp_path) -> None:
    data = _retrieval()
    model = _model(data)
    run = retrieve(model, data, depth=25)
    assert all(len(hits) == 25 for hits in run.values())
    write_run(run, tmp_path / "x.run")
    measures = MEASURES[:3]
    direct = evaluate_retrieval(model, data, measures=measures, bootstrap=NONE)
    from_file = evaluate_run(read_run(tmp_path / "x.run"), data, measures=measures, bootstrap=NONE)
    for name, values in direct.items.scores.items():
        np.testing.assert_array_equal(from_file.items.scores[name], values)
    by_library = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 5],
        [ir_measures.Qrel(q, d, r) for q, judged in data.qrels.items() for d, r in judged.items()],
        ir_measures.read_trec_run(str(tmp_path / "x.run")),
    )
    assert by_library[ir_measures.nDCG @ 5] == pytest.approx(direct.scores["all"]["nDCG@5"].value)


def test_equal_documents_are_ranked_in_the_corpus_order_by_every_program() -> None:
    data = Retrieval(
        corpus={f"d{i}": "same" for i in range(12)} | {"best": "q"},
        queries={"1": "q"},
        qrels={"1": {"d1": 1}},
    )
    run = retrieve(TableEncoder(), data)["1"]
    assert list(run) == ["best", *(f"d{i}" for i in range(12))]
    single = np.array(list(run.values()), dtype=np.float32)
    assert (np.diff(single) < 0).all()  # trec_eval compares float32
    np.testing.assert_allclose(single[1:], single[1], rtol=1e-5)
    found = evaluate_run({"1": run}, data, measures=["MRR@10"], bootstrap=NONE)
    assert found.scores["all"]["MRR@10"].value == pytest.approx(1 / 3)


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    low, high = bootstrap_bounds(
        [np.arange(len(values))], lambda rows: values[rows].mean(-1)[None], resamples=200, seed=5
    )
    return values.mean(), low[0], high[0]


def test_intervals_are_of_queries_and_pairs_of_models_are_compared() -> None:
    data = _retrieval(80, domains=False)
    bootstrap = Bootstrap(resamples=200, seed=5)
    first = evaluate_retrieval(_model(data, 0.3), data, name="first", bootstrap=bootstrap)
    second = evaluate_retrieval(_model(data, 4.0), data, name="second", bootstrap=bootstrap)
    score, values = first.scores["all"]["nDCG@10"], first.items.scores["nDCG@10"]
    assert (score.value, score.low, score.high) == pytest.approx(_interval(values))
    other = second.items.scores["nDCG@10"]
    difference = compare(first, second).differences["all"]["nDCG@10"]
    found = difference.value, difference.low, difference.high
    assert found == pytest.approx(_interval(values - other))
    assert difference.low > 0


def test_a_resample_of_every_query_once_gives_the_metrics() -> None:
    """A resample holds the domains side by side, the data here in turns."""
    domains = ["y", "x", "y", "x", "z"]
    scores = {"MRR@10": np.random.default_rng(0).random(5), "nDCG@10": np.arange(5.0)}
    items = QueryItems([f"q{i}" for i in range(5)], scores, domains, "")
    found = items.resampled(np.concatenate(items.strata)[None])
    for group, metrics in items.metrics().items():
        for name, value in metrics.items():
            assert found[group][name] == pytest.approx([value]), (group, name)


def test_a_domain_of_one_query_has_no_interval() -> None:
    data = _retrieval()
    data.domains.update(dict.fromkeys(data.queries, "x") | {"q0": "y"})
    found = evaluate_retrieval(_model(data), data, bootstrap=Bootstrap(resamples=20))
    alone, rest = found.scores["y"]["MRR@10"], found.scores["all"]["MRR@10"]
    assert np.isnan(alone.low) and np.isfinite(alone.value)
    assert rest.low < rest.high


def test_domains_and_prompts_go_to_the_model() -> None:
    data, model = _retrieval(4, 5), TableEncoder()
    data = replace(data, corpus_domains={f"d{i}": "z" for i in range(5)})
    options = EncodeOptions(pass_domain=True, document_prompt="D: ")
    evaluate_retrieval(model, data, encode=options, bootstrap=NONE)
    assert [call["domain"] for call in model.calls] == [["x", "y", "x", "y"], ["z"] * 5]
    assert [call.get("prompt") for call in model.calls] == [None, "D: "]
    with pytest.raises(ValueError, match="this data has none"):
        evaluate_retrieval(model, _retrieval(), encode=options)


# --- BEIR's conventions -------------------------------------------------------------------------


class Letters:
    """Counts letters."""

    def encode(self, texts, **_):
        return np.array([[text.count(letter) for letter in "abcdef"] for text in texts], float)


DUPLICATES = Retrieval(  # the queries are documents, as in ArguAna and Quora
    corpus={"x": "aab", "y": "aabb", "z": "ccd", "u": "ccdd", "v": "eef"},
    queries={"x": "aab", "z": "ccd"},
    qrels={"x": {"y": 1}, "z": {"u": 1}},
)


def test_the_document_with_the_querys_own_id_is_no_hit() -> None:
    found = evaluate_retrieval(Letters(), DUPLICATES, bootstrap=NONE)
    assert found.scores["all"]["MRR@10"].value == 1.0
    assert found.settings["ignore_identical_ids"] is True
    kept = evaluate_retrieval(Letters(), DUPLICATES, ignore_identical_ids=False, bootstrap=NONE)
    assert kept.scores["all"]["MRR@10"].value == 0.5
    with pytest.raises(ValueError, match="not measured on the same items"):
        compare(found, kept)


def test_a_run_has_its_depth_without_the_own_document() -> None:
    run = retrieve(Letters(), DUPLICATES, depth=2)
    assert [list(hits) for hits in run.values()] == [["y", "z"], ["u", "x"]]
    run = retrieve(Letters(), DUPLICATES, depth=2, ignore_identical_ids=False)
    assert [list(hits) for hits in run.values()] == [["x", "y"], ["z", "u"]]
    # a run of another program, with the own documents in it
    found = evaluate_run(run, DUPLICATES, bootstrap=NONE)
    assert found.scores["all"]["MRR@10"].value == 1.0
    assert found.details["all"]["own_documents_ignored"] == 2


def test_judgements_of_the_own_document_are_said_to_be_out_of_reach(caplog) -> None:
    data = replace(DUPLICATES, qrels={"x": {"x": 1, "y": 1}, "z": {"u": 1}})
    found = evaluate_retrieval(Letters(), data, measures=["Recall@5"], bootstrap=NONE)
    assert found.scores["all"]["Recall@5"].value == 0.75
    assert "1 queries judge the document with their own id relevant" in caplog.text


def test_queries_without_judgements_are_not_scored_and_those_without_relevant_score_0(
    caplog,
) -> None:
    data = replace(DUPLICATES, queries={**DUPLICATES.queries, "none": "e", "no": "ef"})
    data.qrels["no"] = {"v": 0}
    found = evaluate_retrieval(Letters(), data, measures=["nDCG@5", "MRR@10"], bootstrap=NONE)
    assert found.scores["all"]["MRR@10"].value == pytest.approx(2 / 3)
    assert found.details["all"] == {
        "queries": 3,
        "queries_without_relevant": 1,
        "queries_without_judgements": 1,
        "own_documents_ignored": 2,
    }
    assert "1 of 4 queries have no judgements and are not scored" in caplog.text
    assert "1 of 3 queries have no relevant document and score 0" in caplog.text


def test_a_relevance_of_0_or_less_is_not_relevant() -> None:
    data = Retrieval(
        {"d": "a", "e": "ab"}, {"q": "a", "r": "ab"}, {"q": {"d": -1, "e": 1}, "r": {"e": 2}}
    )
    found = evaluate_retrieval(Letters(), data, measures=["MRR@5"], bootstrap=NONE)
    assert found.items.scores["MRR@5"].tolist() == [0.5, 1.0]


def test_queries_are_compared_by_their_ids() -> None:
    """The same data in another order, as two files may hold it."""
    data = _retrieval(30)
    turned = Retrieval(
        *(dict(reversed(part.items())) for part in (data.corpus, data.queries, data.qrels)),
        domains=dict(reversed(data.domains.items())),
    )
    bootstrap = Bootstrap(resamples=50)
    first = evaluate_retrieval(_model(data, 0.3), data, bootstrap=bootstrap)
    other = _model(data, 4.0)
    expected = compare(first, evaluate_retrieval(other, data, bootstrap=bootstrap))
    found = compare(first, evaluate_retrieval(other, turned, bootstrap=bootstrap))
    for group, scores in expected.differences.items():
        for name, score in scores.items():
            same = found.differences[group][name]
            assert (same.value, same.low, same.high) == pytest.approx(
                (score.value, score.low, score.high)
            )


def test_domains_that_the_model_does_not_know_are_found_before_encoding() -> None:
    model = TableEncoder()
    model.transformers_model = SimpleNamespace(config=SimpleNamespace(domains=["x", "z"]))
    data = replace(_retrieval(4, 5), corpus_domains={f"d{i}": "z" for i in range(5)})
    with pytest.raises(ValueError, match="queries: the domain 'y' is none of the model's; .* x, z"):
        evaluate_retrieval(model, data)
    assert not model.calls


def test_tfidf_searches_a_corpus() -> None:
    corpus = {"1": "a stent keeps an artery open", "2": "a tort is a civil wrong"}
    data = Retrieval(
        corpus, {"q": "which artery", "r": "civil law"}, {"q": {"1": 1}, "r": {"2": 1}}
    )
    found = evaluate_retrieval(TfidfEncoder(corpus.values()), data, bootstrap=NONE)
    assert found.scores["all"]["MRR@10"].value == 1.0


_GOOD = {"corpus": {"d": "text"}, "queries": {"q": "text"}, "qrels": {"q": {"d": 1}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qrels": {"q": {"d": 0}}}, "none of the 1 queries has a relevant document"),
        ({"qrels": {}}, "none of the 1 queries has a relevant document"),
        ({"qrels": {"q": {"d": 1, "e": 1}}}, "qrels: query 'q': unknown document 'e'"),
        ({"qrels": {"q": {"d": 1}, "r": {"d": 1}}}, "query 'r' is not among the queries"),
        ({"domains": {}}, "domains: 1 queries have none, as 'q'"),
        ({"queries": {}, "qrels": {}}, "got 0, 1 and 10"),
    ],
)
def test_what_cannot_be_scored_is_found_before_encoding(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(None, Retrieval(**_GOOD | changes))


@pytest.mark.parametrize(
    ("run", "message"),
    [({"r": {"d": 1.0}}, "query 'r'"), ({"q": {"e": 1.0}}, "unknown document 'e'")],
)
def test_a_run_of_other_data_is_refused(run: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_run(run, Retrieval(**_GOOD))
