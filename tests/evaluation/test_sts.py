from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats

from moe_fast.evaluation import Bootstrap, compare, evaluate_sts
from tests.evaluation.fakes import TableEncoder

NONE = Bootstrap(resamples=0)


def _data(rows: int = 60) -> dict[str, list]:
    rng = random.Random(0)
    return {
        "a": [f"a{i}" for i in range(rows)],
        "b": [f"b{i}" for i in range(rows)],
        "score": [rng.randrange(6) / 1.0 for _ in range(rows)],
        "domain": ["xy"[i % 2] for i in range(rows)],
    }


def _model(data: dict[str, list], noise: float = 1.0) -> TableEncoder:
    model, rng = TableEncoder(), np.random.default_rng(0)
    for a, b, score in zip(data["a"], data["b"], data["score"], strict=True):
        model.table[b] = score * model.vector(a) / 3 + noise * rng.normal(size=model.width)
    return model


def test_the_correlations_are_scipys() -> None:
    data = _data()
    model = _model(data)
    found = evaluate_sts(model, data, name="m", bootstrap=NONE)
    assert list(found.scores) == ["x", "y", "all"]
    for group in found.scores:
        rows = [i for i in range(60) if group in ("all", data["domain"][i])]
        cosines = [model.cosine(data["a"][i], data["b"][i]) for i in rows]
        gold = [data["score"][i] for i in rows]
        spearman, pearson = stats.spearmanr(cosines, gold), stats.pearsonr(cosines, gold)
        assert found.scores[group]["Spearman"].value == pytest.approx(spearman.statistic)
        assert found.scores[group]["Pearson"].value == pytest.approx(pearson.statistic)
        assert found.details[group]["pairs"] == len(rows)


def test_each_resample_is_scored_by_scipy() -> None:
    items = evaluate_sts(_model(_data()), _data(), bootstrap=NONE).items
    rng = np.random.default_rng(1)
    rows = np.concatenate([rng.choice(stratum, (5, len(stratum))) for stratum in items.strata], 1)
    found = items.resampled(rows)
    for i, row in enumerate(rows):
        for group, columns in {"x": row[:30], "y": row[30:], "all": row}.items():
            pair = items.cosines[columns], items.gold[columns]
            assert found[group]["Spearman"][i] == pytest.approx(stats.spearmanr(*pair).statistic)
            assert found[group]["Pearson"][i] == pytest.approx(stats.pearsonr(*pair).statistic)


def test_intervals_and_the_comparison_of_two_models() -> None:
    data = _data(200)
    first = evaluate_sts(_model(data, noise=0.5), data, bootstrap=Bootstrap(resamples=300))
    second = evaluate_sts(_model(data, noise=3.0), data, bootstrap=Bootstrap(resamples=300))
    score = first.scores["all"]["Spearman"]
    assert 0 < score.low < score.value < score.high < 1
    difference = compare(first, second).differences["all"]["Spearman"]
    assert difference.value == pytest.approx(score.value - second.scores["all"]["Spearman"].value)
    assert 0 < difference.low < difference.value < difference.high


def test_the_numbers_of_sentence_transformers_evaluator(tmp_path) -> None:
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    from sentence_transformers import SentenceTransformer

    from tests.models.tiny import save_sentence_transformer

    model = SentenceTransformer(save_sentence_transformer(tmp_path), device="cpu")
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(54)}" for _ in range(5)) for _ in range(80)]
    gold = [rng.random() for _ in range(40)]
    theirs = evaluation.EmbeddingSimilarityEvaluator(
        texts[:40], texts[40:], gold, main_similarity="cosine"
    )(model)
    ours = evaluate_sts(model, {"a": texts[:40], "b": texts[40:], "score": gold}, bootstrap=NONE)
    scores = ours.scores["all"]
    assert scores["Spearman"].value == pytest.approx(theirs["spearman_cosine"])
    assert scores["Pearson"].value == pytest.approx(theirs["pearson_cosine"], abs=1e-5)


def test_what_is_constant_has_no_correlation() -> None:
    data = {"a": ["1", "2", "3"], "b": ["4", "5", "6"], "score": [0, 1, 2]}
    collapsed = TableEncoder({text: [1.0, 0.0] for text in "123456"})
    found = evaluate_sts(collapsed, data, bootstrap=Bootstrap(resamples=20))
    score = found.scores["all"]["Spearman"]
    assert np.isnan([score.value, score.low, score.high]).all()
    values = found.to_dict()["scores"]["all"]["Spearman"]
    assert values == {"value": None, "low": None, "high": None}


def test_a_domain_of_one_pair_is_left_without_a_number_of_its_own() -> None:
    data = _data(21) | {"domain": ["x"] * 20 + ["y"]}
    found = evaluate_sts(_model(data), data, bootstrap=Bootstrap(resamples=50))
    assert np.isnan(found.scores["y"]["Spearman"].value)
    assert found.scores["all"]["Spearman"].low < found.scores["all"]["Spearman"].high


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0, None], "dataset, row 1: score must be a finite number; got None"),
        ([float("nan"), 1.0], "row 0: .* got nan"),
        (["3", 1.0], "row 0: .* got '3'"),
        ([2.0, 2.0], "needs different scores; all 2 are 2.0"),
    ],
)
def test_scores_that_cannot_be_used(scores: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_sts(None, {"a": ["1", "2"], "b": ["3", "4"], "score": scores})


def test_the_scale_of_the_scores_is_stated(caplog) -> None:
    data = {"a": list("abcdef"), "b": list("ghijkl"), "domain": list("xxxyyy")}
    found = evaluate_sts(TableEncoder(), data | {"score": [0, 2, 5, 0.5, 5, 1]}, bootstrap=NONE)
    scales = {group: numbers["highest_score"] for group, numbers in found.details.items()}
    assert scales == {"x": 5, "y": 5, "all": 5} and found.details["y"]["lowest_score"] == 0.5
    assert not caplog.text
    evaluate_sts(TableEncoder(), data | {"score": [0, 2, 5, 0.5, 0.9, 0]}, bootstrap=NONE)
    assert "different scales (x 0 to 5, y 0 to 0.9)" in caplog.text
