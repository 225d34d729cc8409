"""bench.serving: a wrong vector is noticed."""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra moe-fast[serve]")
pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")

from bench.serving import are_right, questions_of
from moe_fast.inference import load_model
from moe_fast.serving.requests import answer
from tests.serving.tiny import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


def test_a_wrong_vector_is_found(models):
    model = load_model(str(models / "enforced"), device="cpu")
    for question in questions_of(model, "odd", 6):
        vectors = question.vectors.copy()
        answers = []
        for change in (0.0, 0.01):
            vectors[0, 3] += change
            answers.append(json.dumps(answer(vectors, "enforced", 1, "base64")).encode())
        assert [are_right(a, question) for a in answers] == [0, 1]
