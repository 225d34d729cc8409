"""The experiment on a small made-up set of the same form: the split."""

import json

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("ir_measures")

from experiments.medquad import Settings, load
from tests.training.tiny_models import DOMAINS, WORDS

SETTINGS = Settings(
    train_pairs=24, questions=12, answers=18, tokens=16, batch_size=8, usage_texts=2
)


@pytest.fixture
def data(tmp_path):
    """Ten diseases per domain with three questions each; some texts stand under two diseases."""
    path = tmp_path / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for domain in DOMAINS:
            for disease in range(10):
                for question in range(3):
                    first, second = WORDS[domain][disease % 8], WORDS[domain][question]
                    row = {
                        "a": f"{first} {second} {disease} {question}",
                        "b": f"{second} {first} {min(disease, 8)} {question}",
                        "domain": domain,
                        "focus": f"{domain} {disease}".upper()
                        if question
                        else f"{domain} {disease}",
                    }
                    print(json.dumps(row), file=file)
    return path


def test_no_disease_question_or_answer_is_on_both_sides(data):
    train, test = load(data, SETTINGS)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    disease_of = {(row["a"], row["b"]): row["focus"].casefold() for row in rows}
    trained = {disease_of[pair] for pair in zip(train["a"], train["b"], strict=True)}
    answers = set(test.corpus.values())
    held_out = {row["focus"].casefold() for row in rows if row["a"] in test.queries.values()}
    assert not trained & held_out
    assert not set(train["a"]) & set(test.queries.values())
    assert not set(train["b"]) & answers
    assert (len(train), len(test.queries), len(test.corpus)) == (24, 12, 18)


def test_every_answer_to_a_question_is_relevant(data):
    _, test = load(data, SETTINGS)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for query, text in test.queries.items():
        wanted = {row["b"] for row in rows if row["a"] == text} & set(test.corpus.values())
        assert {test.corpus[document] for document in test.qrels[query]} == wanted
        assert wanted


def test_too_little_data_is_an_error(data):
    with pytest.raises(ValueError, match=r"train_pairs=1000: there are \d+ pairs"):
        load(data, Settings(train_pairs=1000))
