"""bench.serving: a small load, with its troublemakers, on a tiny model."""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra moe-fast[serve]")
pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")

from bench.serving import are_right, main, questions_of
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


@pytest.mark.slow
def test_a_load_with_trouble(models, tmp_path):
    settings = ["--kinds", "odd", "--clients", "6", "--seconds", "6", "--texts", "20"]
    output = tmp_path / "load.json"
    more = ["--threads", "2", "--workers", "2", "--trouble", "--only-ours", "-o", str(output)]
    assert main([str(models / "enforced"), *settings, *more]) == 0
    (load,) = json.loads(output.read_text())["loads"]
    assert load["requests"] > 10
    assert (load["wrong"], load["errors"], load["workers"]) == (0, {}, 2)
    assert load["troublemakers"]["garbage: 400"] >= 1
    assert {name.split(":")[0] for name in load["troublemakers"]} == {"garbage", "hanging"}
