"""fit_domain_predictor, predict_domain and domain="auto", alone and among known domains."""

import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import moe_fast

pytest.importorskip("sklearn", reason="needs the extra moe-fast[eval]")

DOMAINS = ["law", "medicine", "music"]
WORDS = 16  # of each domain's own


def make_texts(count, seed=0, mixed=0.2):
    """Texts of words that are mostly their domain's own, and their domains."""
    rng = np.random.default_rng(seed)
    texts, domains = [], []
    for i in range(count):
        own = i % 3
        places = np.where(rng.random(6) < mixed, rng.integers(0, 3, 6), own)
        texts.append(" ".join(f"w{WORDS * p + rng.integers(WORDS)}" for p in places))
        domains.append(DOMAINS[own])
    return texts, domains


@pytest.fixture
def mixture(dense):
    """Three experts that differ, one per domain, and no predictor yet."""
    model = moe_fast.upcycle(dense, num_experts=3, routing="enforced", domains=DOMAINS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for mlp in model.transformers_model.moe_mlps().values():
            mlp.down_proj += 0.2 * torch.randn(mlp.down_proj.shape, generator=generator)
    return model


@pytest.fixture
def fitted(mixture):
    return mixture.fit_domain_predictor(*make_texts(120))


def test_it_predicts_new_texts(fitted):
    texts, domains = make_texts(60, seed=1)
    found = fitted.predict_domain(texts)
    accuracy = np.mean([a == b for a, b in zip(found.domains, domains, strict=True)])
    assert accuracy >= 0.85
    assert fitted.transformers_model.config.domain_predictor["accuracy"] >= 0.85
    assert found.probabilities.shape == (60, 3) and found.probabilities.dtype == np.float32
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    assert [DOMAINS[i] for i in found.probabilities.argmax(1)] == found.domains


def test_it_is_the_logistic_regression_of_the_mean_word_embeddings(mixture):
    """Fitted here once more, in float64, and applied text by text."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from moe_fast.encoding.domain_prediction import _LOSS_WEIGHT

    texts, domains = make_texts(90)
    mixture.fit_domain_predictor(texts, domains)
    words = mixture.transformers_model.get_input_embeddings().weight.detach().double().numpy()

    def means(of):
        rows = [mixture.tokenizer(text)["input_ids"] for text in of]
        return np.stack([np.mean([words[i] for i in ids], axis=0) for ids in rows])

    scaler = StandardScaler().fit(means(texts))
    classifier = LogisticRegression(C=_LOSS_WEIGHT / len(texts), max_iter=1000, tol=1e-4)
    classifier.fit(scaler.transform(means(texts)), domains)
    new = make_texts(40, seed=2)[0]
    want = classifier.predict_proba(scaler.transform(means(new)))
    assert list(classifier.classes_) == DOMAINS
    np.testing.assert_allclose(mixture.predict_domain(new).probabilities, want, atol=1e-5)


def test_two_domains(dense):
    model = moe_fast.upcycle(dense, num_experts=2, routing="enforced", domains=["b", "a"])
    texts, domains = make_texts(60)
    kept = [(t, "a" if d == "law" else "b") for t, d in zip(texts, domains, strict=True)]
    model.fit_domain_predictor(*zip(*kept, strict=True))
    found = model.predict_domain([t for t, _ in kept])
    assert np.mean([a == d for a, (_, d) in zip(found.domains, kept, strict=True)]) >= 0.85


def test_auto_is_the_predicted_name(fitted):
    texts, _ = make_texts(20, seed=3)
    names = fitted.predict_domain(texts).domains
    assert len(set(names)) == 3
    want = fitted.encode(texts, domain=names)
    assert np.array_equal(fitted.encode(texts, domain="auto"), want)
    assert np.array_equal(
        fitted.encode(texts[4], domain="auto"), fitted.encode(texts[4], domain=names[4])
    )
    assert np.array_equal(
        fitted.encode(texts, domain="auto", packed=False, batch_size=3).shape, want.shape
    )


def test_auto_among_known_domains(fitted):
    texts, _ = make_texts(9, seed=4)
    names = fitted.predict_domain(texts).domains
    given = ["auto", "law", "auto", "music", "music", "auto", "medicine", "auto", "law"]
    expected = [n if g == "auto" else g for n, g in zip(names, given, strict=True)]
    assert np.array_equal(fitted.encode(texts, domain=given), fitted.encode(texts, domain=expected))
    assert fitted.encode([], domain="auto").shape[0] == 0
    assert fitted.encode([], domain=[]).shape[0] == 0


def test_one_text(fitted):
    text = make_texts(1)[0][0]
    one, many = fitted.predict_domain(text), fitted.predict_domain([text])
    assert one.domains == many.domains[0]
    assert np.array_equal(one.probabilities, many.probabilities[0])
    assert fitted.predict_domain([]).probabilities.shape == (0, 3)


def test_prompts_are_part_of_the_text(fitted):
    texts, _ = make_texts(12, seed=5)
    with_prompt = fitted.predict_domain(texts, prompt_name="query")
    spelled_out = fitted.predict_domain([f"w1 {text}" for text in texts])
    assert np.array_equal(with_prompt.probabilities, spelled_out.probabilities)
    names = with_prompt.domains
    queries = fitted.encode_query(texts, domain="auto")
    assert np.array_equal(queries, fitted.encode_query(texts, domain=names))


def test_the_columns_are_the_models_domains_whatever_the_order_of_the_texts(mixture):
    texts, domains = make_texts(90)
    first = mixture.fit_domain_predictor(texts, domains).predict_domain(texts).probabilities
    again = mixture.fit_domain_predictor(texts[::-1], domains[::-1])
    np.testing.assert_allclose(again.predict_domain(texts).probabilities, first, atol=1e-3)


def test_saved_and_loaded_by_both_classes(fitted, tmp_path):
    texts, _ = make_texts(10, seed=6)
    want = fitted.encode(texts, domain="auto")
    fitted.save_pretrained(str(tmp_path / "ours"))
    ours = moe_fast.MoESentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert np.array_equal(ours.encode(texts, domain="auto"), want)
    assert ours.predict_domain(texts).domains == fitted.predict_domain(texts).domains
    stock = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    np.testing.assert_allclose(stock.encode(texts, domain="auto"), want, atol=1e-6)
    stock.save_pretrained(str(tmp_path / "stock"))
    again = moe_fast.MoESentenceTransformer(str(tmp_path / "stock"), device="cpu")
    assert np.array_equal(again.encode(texts, domain="auto"), want)


def test_later_training_does_not_change_it(fitted):
    texts, _ = make_texts(20, seed=7)
    before = fitted.predict_domain(texts).probabilities
    with torch.no_grad():
        for parameter in fitted.parameters():
            parameter += torch.randn_like(parameter)
    assert np.array_equal(fitted.predict_domain(texts).probabilities, before)


def test_auto_as_default(fitted):
    texts, _ = make_texts(10, seed=8)
    want = fitted.encode(texts, domain="auto")
    fitted.transformers_model.config.default_domain = "auto"
    assert np.array_equal(fitted.encode(texts), want)


def test_half_precision(fitted):
    texts, _ = make_texts(30, seed=9)
    names = fitted.predict_domain(texts).domains
    assert fitted.bfloat16().predict_domain(texts).domains == names
    assert fitted.fit_domain_predictor(*make_texts(120)).predict_domain(texts).domains == names


def test_long_texts_are_cut_as_in_encode(fitted, caplog):
    texts = [" ".join(["w1"] * 50), "w2"]
    with pytest.raises(ValueError, match=r"max_seq_length = 32 tokens each; text 0 has 52"):
        fitted.predict_domain(texts)
    with caplog.at_level(logging.WARNING):
        fitted.encode(texts, domain="auto", truncate=True)
    assert len([r for r in caplog.records if "truncated" in r.message]) == 1
    cut = fitted.predict_domain([" ".join(["w1"] * 30), "w2"]).probabilities
    assert np.array_equal(fitted.predict_domain(texts, truncate=True).probabilities, cut)


def test_fitting_needs_texts_of_every_domain(mixture):
    texts, domains = make_texts(90)
    few = [(t, d) for t, d in zip(texts, domains, strict=True) if d != "music"][:54]
    few += [(texts[2], "music")] * 4
    with pytest.raises(ValueError, match=r"at least 5 texts of each .* too few of music \(4\)"):
        mixture.fit_domain_predictor(*zip(*few, strict=True))
    with pytest.raises(ValueError, match=r"too few of law \(0\), medicine \(0\), music \(0\)"):
        mixture.fit_domain_predictor([], [])
    assert mixture.transformers_model.config.domain_predictor is None


@pytest.mark.parametrize(
    ("texts", "domains", "error", "message"),
    [
        (["w1"] * 3, ["law"] * 2, ValueError, "got 2 names for 3 texts"),
        (["w1"], ["tax"], ValueError, r"one of the model's domains \('law'.*got 'tax'"),
        (["w1"], ["auto"], ValueError, "got 'auto'"),
        (["w1"], "law", TypeError, "domains must be a sequence of names"),
        ([7] * 15, DOMAINS * 5, TypeError, r"predicted from texts \(str\); got int"),
    ],
)
def test_bad_arguments_of_fit(mixture, texts, domains, error, message):
    with pytest.raises(error, match=message):
        mixture.fit_domain_predictor(texts, domains)


def test_a_model_without_domains_or_without_a_predictor(dense, mixture):
    learned = moe_fast.upcycle(dense, num_experts=2)
    with pytest.raises(ValueError, match=r"needs a model with domains.*moe_fast.upcycle"):
        learned.fit_domain_predictor(*make_texts(30))
    for call in (mixture.predict_domain, lambda t: mixture.encode(t, domain="auto")):
        with pytest.raises(ValueError, match=r"model has none: fit one with"):
            call(["w1"])
    with pytest.raises(ValueError, match=r"model has none: fit one with"):
        mixture.encode(["w1", "w2"], domain=["law", "auto"])


def test_a_domain_that_came_later(fitted):
    grown = moe_fast.add_expert(fitted, "sports")
    message = r"sports came after it was fitted\. Fit it again .*, or name the domain"
    with pytest.raises(ValueError, match=message):
        grown.encode(["w1"], domain="auto")
    with pytest.raises(ValueError, match=message):
        grown.predict_domain(["w1"])
    assert grown.encode(["w1"], domain="sports").shape == (1, 32)
    texts, domains = make_texts(90)
    grown.fit_domain_predictor([*texts, *["w52 w53"] * 5], [*domains, *["sports"] * 5])
    assert grown.predict_domain("w52 w53 w52").domains == "sports"


def test_without_scikit_learn(mixture, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"fit_domain_predictor needs scikit-learn.*eval"):
        mixture.fit_domain_predictor(*make_texts(30))


def test_prediction_needs_no_scikit_learn(fitted, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert fitted.encode(["w1"], domain="auto").shape == (1, 32)
