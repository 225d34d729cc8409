from __future__ import annotations

import json
import random

import numpy as np
import pytest
import sklearn.metrics

from moe_fast.evaluation import Bootstrap, EncodeOptions, TfidfEncoder, compare, evaluate_pairs
from tests.evaluation.fakes import TableEncoder

NONE = Bootstrap(resamples=0)


def _pairs(rows: int = 60, seed: int = 0, domains: bool = True) -> dict[str, list]:
    rng = random.Random(seed)
    labels = [rng.randrange(2) for _ in range(rows)]
    labels[:6] = [0, 0, 0, 1, 1, 1]  # both in every domain
    data = {
        "a": [f"a{seed}.{i}" for i in range(rows)],
        "b": [f"b{seed}.{i}" for i in range(rows)],
        "label": labels,
    }
    return data | {"domain": ["xyz"[i % 3] for i in range(rows)]} if domains else data


def _model(*datasets: dict[str, list], seed: int = 0, noise: float = 1.0) -> TableEncoder:
    """Pairs labelled 1 are close, more so in domain x."""
    model, rng = TableEncoder(seed=seed), np.random.default_rng(seed)
    for data in datasets:
        for i, (a, b) in enumerate(zip(data["a"], data["b"], strict=True)):
            domain = data.get("domain", ["y"] * (i + 1))[i]
            if data["label"][i]:
                scale = noise * (0.6 if domain == "x" else 1.4)
                model.table[b] = model.vector(a) + scale * rng.normal(size=model.width)
    return model


def _scores(model: TableEncoder, data: dict[str, list], domain: str | None = None):
    chosen = [i for i in range(len(data["a"])) if domain is None or domain == data["domain"][i]]
    cosines = np.array([model.cosine(data["a"][i], data["b"][i]) for i in chosen])
    return cosines, np.array([data["label"][i] for i in chosen])


def _best_f1(cosines: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    return max((sklearn.metrics.f1_score(labels, cosines >= t - 1e-9), t) for t in cosines)


def _values(evaluation, group: str) -> dict[str, float]:
    return {name: score.value for name, score in evaluation.scores[group].items()}


def test_labelled_pairs_by_scikit_learn_called_directly() -> None:
    data = _pairs()
    model = _model(data)
    found = evaluate_pairs(model, data, bootstrap=NONE)
    assert list(found.scores) == ["x", "y", "z", "all"]
    shared = _best_f1(*_scores(model, data))[1]
    for group in found.scores:
        cosines, labels = _scores(model, data, None if group == "all" else group)
        assert _values(found, group) == pytest.approx(
            {
                "ROC-AUC": sklearn.metrics.roc_auc_score(labels, cosines),
                "AP": sklearn.metrics.average_precision_score(labels, cosines),
                "F1max": sklearn.metrics.f1_score(labels, cosines >= shared - 1e-9),
            }
        )
        predicted = cosines >= shared - 1e-9
        means = cosines[labels == 1].mean(), cosines[labels == 0].mean()
        assert found.details[group] == pytest.approx(
            {
                "pairs": len(labels),
                "positives": labels.sum(),
                "negatives": (1 - labels).sum(),
                "threshold": shared,
                "precision": sklearn.metrics.precision_score(labels, predicted),
                "recall": sklearn.metrics.recall_score(labels, predicted),
                "positive_mean": means[0],
                "negative_mean": means[1],
                "ratio": means[0] / means[1],
            }
        )
    assert found.settings["f1_threshold"] == "shared"
    assert found.settings["negatives"] == "labelled"


def test_one_threshold_per_domain() -> None:
    data = _pairs()
    model = _model(data)
    found = evaluate_pairs(model, data, threshold="per_domain", bootstrap=NONE)
    predicted, labels = [], []
    for domain in "xyz":
        cosines, truth = _scores(model, data, domain)
        f1, threshold = _best_f1(cosines, truth)
        assert found.scores[domain]["F1max"].value == pytest.approx(f1)
        assert found.details[domain]["threshold"] == pytest.approx(threshold)
        predicted += list(cosines >= threshold - 1e-9)
        labels += list(truth)
    assert found.scores["all"]["F1max"].value == pytest.approx(
        sklearn.metrics.f1_score(labels, predicted)
    )
    assert found.details["all"]["threshold"] is None
    assert found.details["all"]["precision"] == pytest.approx(
        sklearn.metrics.precision_score(labels, predicted)
    )
    shared = evaluate_pairs(model, data, bootstrap=NONE)
    assert found.scores["all"]["F1max"].value > shared.scores["all"]["F1max"].value
    assert found.scores["x"]["ROC-AUC"].value == shared.scores["x"]["ROC-AUC"].value


@pytest.mark.parametrize("threshold", ["shared", "per_domain"])
def test_accuracy_at_a_threshold_chosen_on_the_dev_set(threshold: str) -> None:
    data, dev = _pairs(), _pairs(seed=1)
    model = _model(data, dev)
    found = evaluate_pairs(model, data, dev=dev, threshold=threshold, bootstrap=NONE)
    correct = []
    for domain in "xyz":
        tuned, truth = _scores(model, dev, None if threshold == "shared" else domain)
        accuracies = [np.mean((tuned >= t - 1e-9) == truth) for t in tuned]
        best = max(tuned[np.flatnonzero(accuracies == np.max(accuracies))])
        cosines, labels = _scores(model, data, domain)
        mine = (cosines >= best - 1e-9) == labels
        assert found.scores[domain]["accuracy"].value == pytest.approx(mine.mean())
        correct += list(mine)
    assert found.scores["all"]["accuracy"].value == pytest.approx(np.mean(correct))
    assert set(found.settings["accuracy_threshold"]) == {"x", "y", "z", "all"}


def test_a_shared_threshold_asks_nothing_of_the_dev_sets_domains() -> None:
    data = _pairs()
    dev = _pairs(seed=1) | {"domain": ["other"] + ["x"] * 59}
    found = evaluate_pairs(_model(data, dev), data, dev=dev, bootstrap=NONE)
    assert len(set(found.settings["accuracy_threshold"].values())) == 1


def test_columns_may_be_arrays() -> None:
    data = _pairs()
    arrays = {name: np.array(column) for name, column in data.items()}
    first = evaluate_pairs(_model(data), arrays, bootstrap=Bootstrap(resamples=9))
    second = evaluate_pairs(_model(data), data, bootstrap=NONE)
    assert compare(first, second).differences["all"]["AP"].value == 0


def test_without_a_dev_set_no_accuracy_is_reported_and_that_is_said() -> None:
    found = evaluate_pairs(_model(_pairs()), _pairs(), bootstrap=NONE)
    assert "accuracy" not in found.scores["all"]
    assert "no dev set" in found.settings["accuracy_threshold"]


def test_without_labels_everything_off_the_diagonal_is_a_negative() -> None:
    texts = {"a": ["p", "q", "p", "r", "s", "t"], "b": ["1", "2", "3", "2", "r", "4"]}
    domains = ["x", "x", "x", "y", "y", "y"]
    # (p,1) and (p,3): neither is a negative of the other; (q,2) and (r,2) likewise;
    # r stands in b, too, and a text is no negative of itself
    known = {"p": "13", "q": "2", "r": "2r", "s": "r", "t": "4"}
    model = TableEncoder()
    data = texts | {"domain": domains}
    found = evaluate_pairs(model, data, bootstrap=NONE)
    for group in ("x", "y", "all"):
        rows = [i for i in range(6) if group in ("all", domains[i])]
        positives = [model.cosine(texts["a"][i], texts["b"][i]) for i in rows]
        negatives = [
            model.cosine(texts["a"][i], texts["b"][j])
            for i in rows
            for j in rows
            if texts["b"][j] not in known[texts["a"][i]]
        ]
        cosines = np.array(positives + negatives)
        labels = np.array([1] * len(positives) + [0] * len(negatives))
        assert found.details[group]["negatives"] == len(negatives)
        assert found.details[group]["negative_mean"] == pytest.approx(np.mean(negatives))
        values = _values(found, group)
        assert values["ROC-AUC"] == pytest.approx(sklearn.metrics.roc_auc_score(labels, cosines))
        if group == "all":
            assert values["F1max"] == pytest.approx(_best_f1(cosines, labels)[0])
    assert found.settings["negatives"] == "off-diagonal"
    ones = evaluate_pairs(model, data | {"label": [1] * 6}, bootstrap=NONE)
    assert ones.scores["all"]["AP"].value == found.scores["all"]["AP"].value


def test_a_sparse_model_without_labels() -> None:
    a = ["red apple", "green pear", "blue plum", "ripe fig"]
    data = {"a": a, "b": ["an apple", "a pear", "the plum", "one fig"]}
    found = evaluate_pairs(TfidfEncoder(a + data["b"]), data, bootstrap=Bootstrap(resamples=50))
    assert {name: score.value for name, score in found.scores["all"].items()} == {
        "ROC-AUC": 1.0, "AP": 1.0, "F1max": 1.0
    }  # fmt: skip
    assert found.details["all"]["negatives"] == 12


def test_the_interval_is_that_of_resampled_pairs() -> None:
    data = _pairs(40, domains=False)
    model = _model(data)
    found = evaluate_pairs(model, data, bootstrap=Bootstrap(resamples=400, seed=3))
    cosines, labels = _scores(model, data)
    rng = np.random.default_rng(7)
    aucs = []
    for _ in range(400):
        rows = [
            rng.choice(np.flatnonzero(labels == label), (labels == label).sum()) for label in (1, 0)
        ]
        chosen = np.concatenate(rows)
        aucs.append(sklearn.metrics.roc_auc_score(labels[chosen], cosines[chosen]))
    auc = found.scores["all"]["ROC-AUC"]
    expected = np.percentile(aucs, [2.5, 97.5])
    np.testing.assert_allclose([auc.low, auc.high], expected, atol=0.03)
    assert auc.low < auc.value < auc.high


@pytest.mark.parametrize("threshold", ["shared", "per_domain"])
def test_a_resample_of_every_pair_once_gives_the_metrics(threshold: str) -> None:
    data = _pairs()
    items = evaluate_pairs(_model(data), data, dev=data, threshold=threshold, bootstrap=NONE).items
    once = items.resampled(np.concatenate(items.strata)[None])
    for group, metrics in items.metrics().items():
        found = {name: values.item() for name, values in once[group].items()}
        assert found == pytest.approx(metrics), group


def test_every_resample_has_both_labels() -> None:
    """Of two positives among twelve pairs, one in nine resamples would have none, and no AUC."""
    data = _pairs(12, domains=False) | {"label": [1, 1] + 10 * [0]}
    found = evaluate_pairs(_model(data), data, bootstrap=Bootstrap(resamples=200))
    for name, score in found.scores["all"].items():
        assert score.low <= score.value <= score.high, name


def test_thresholds_of_another_kind_cannot_be_compared() -> None:
    data = _pairs()
    first = evaluate_pairs(_model(data), data, bootstrap=NONE)
    second = evaluate_pairs(_model(data), data, threshold="per_domain", bootstrap=NONE)
    with pytest.raises(ValueError, match="same f1_threshold; got 'shared' and 'per_domain'"):
        compare(first, second)


def test_two_models_are_compared_on_the_same_resamples() -> None:
    data = _pairs(200)
    good, bad = _model(data, noise=0.7), _model(data, noise=1.5)
    bootstrap = Bootstrap(resamples=300)
    first = evaluate_pairs(good, data, name="good", bootstrap=bootstrap)
    second = evaluate_pairs(bad, data, name="bad", bootstrap=bootstrap)
    found = compare(first, second)
    assert (found.first, found.second) == ("good", "bad")
    for group, metrics in found.differences.items():
        for name, score in metrics.items():
            values = [e.scores[group][name].value for e in (first, second)]
            assert score.value == pytest.approx(values[0] - values[1])
            assert score.low <= score.value <= score.high
    auc = found.differences["all"]["ROC-AUC"]
    assert auc.low > 0
    same = compare(first, evaluate_pairs(good, data, bootstrap=NONE))
    assert all(
        s.low == s.high == s.value == 0 for m in same.differences.values() for s in m.values()
    )


def test_the_result_is_json() -> None:
    data = _pairs()
    found = evaluate_pairs(_model(data), data, name="m", bootstrap=Bootstrap(resamples=20))
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (read["task"], read["model"]) == ("pairs", "m")
    score = found.scores["x"]["AP"]
    assert read["scores"]["x"]["AP"] == {"value": score.value, "low": score.low, "high": score.high}
    assert read["settings"]["bootstrap"] == {"confidence": 0.95, "resamples": 20, "seed": 0}


def test_domains_may_be_left_out() -> None:
    data = _pairs()
    found = evaluate_pairs(_model(data), data, by_domain=False, bootstrap=NONE)
    assert list(found.scores) == ["all"]


def test_domains_go_to_the_model_where_asked() -> None:
    data, model = _pairs(), _model(_pairs())
    evaluate_pairs(model, data, encode=EncodeOptions(pass_domain=True), bootstrap=NONE)
    assert model.calls[0]["domain"] == data["domain"]


def test_the_numbers_of_sentence_transformers_evaluator(tmp_path) -> None:
    evaluation = pytest.importorskip("sentence_transformers.sentence_transformer.evaluation")
    from sentence_transformers import SentenceTransformer

    from tests.models.tiny import save_sentence_transformer

    model = SentenceTransformer(save_sentence_transformer(tmp_path), device="cpu")
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(54)}" for _ in range(5)) for _ in range(80)]
    labels = [rng.randrange(2) for _ in range(40)]
    theirs = evaluation.BinaryClassificationEvaluator(
        texts[:40], texts[40:], labels, similarity_fn_names=["cosine"]
    )(model)
    data = {"a": texts[:40], "b": texts[40:], "label": labels}
    ours = evaluate_pairs(model, data, dev=data, bootstrap=NONE)
    assert ours.scores["all"]["AP"].value == pytest.approx(theirs["cosine_ap"])
    assert ours.scores["all"]["F1max"].value == pytest.approx(theirs["cosine_f1"])
    assert ours.scores["all"]["accuracy"].value == pytest.approx(theirs["cosine_accuracy"])
    assert ours.details["all"]["precision"] == pytest.approx(theirs["cosine_precision"])
    assert ours.details["all"]["recall"] == pytest.approx(theirs["cosine_recall"])


class Untouchable:
    def encode(self, *args: object, **keywords: object) -> None:
        raise AssertionError("nothing may be encoded before the data is checked")


_DATA = {"a": ["1", "2", "3", "4"], "b": ["5", "6", "7", "8"], "label": [1, 0, 1, 0]}
_DOMAINS = _DATA | {"domain": ["x", "x", "y", "y"]}


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"a": ["x"]}, {}, "column 'b' is missing"),
        (_DATA | {"label": [1, 2, 0, 1]}, {}, "dataset, row 1: label=2; allowed are 0 and 1"),
        (_DATA | {"label": [1, "maybe", 0, 1]}, {}, "dataset, row 1: label='maybe'"),
        (_DATA | {"label": [0] * 4}, {}, "the 4 pairs have no positives"),
        (_DATA | {"domain": list("xxxy")}, {}, "the 1 pairs of domain 'y' have no positives"),
        ({"a": ["1"], "b": ["2"]}, {}, "the 1 pairs have no negatives"),
        ({"a": ["1", "1"], "b": ["2", "3"]}, {}, "the 2 pairs have no negatives"),
        (_DATA | {"domain": ["all"] * 4}, {}, "'all' is the name of all domains"),
        (_DATA, {"threshold": "best"}, "threshold='best'; allowed are 'shared' and 'per_domain'"),
        (_DATA, {"threshold": "per_domain"}, "needs a dataset with domains"),
        (_DATA, {"dev": {"a": ["1"], "b": ["2"]}}, "dev: the 1 pairs have no negatives"),
        (_DATA, {"dev": {"a": list("12"), "b": list("34")}}, "needs labelled pairs"),
        (_DOMAINS, {"threshold": "per_domain", "dev": _DATA}, r"no pairs of the domains \['x', 'y"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_is_encoded(data, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_pairs(Untouchable(), data, **options)
