"""What the server answers, and what it refuses: status, field and message."""

import base64
import json
import threading

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

import moe_fast
from moe_fast.inference import load_model
from moe_fast.serving import ServerSettings, create_app
from tests.serving.conftest import ask
from tests.serving.tiny import DOMAINS


def vectors_of(answer):
    return np.array([row["embedding"] for row in answer["data"]], np.float32)


JSON = {"Content-Type": "application/json"}
TEXTS = ["w1 w2 w3", "w4", "", "w5 " * 20]


@pytest.mark.parametrize("domain", ["law", ["law", "medicine", "medicine", "law"]])
def test_vectors_are_those_of_encode(client, mixture, domain):
    answer = ask(client, TEXTS, domain=domain)
    np.testing.assert_allclose(
        vectors_of(answer), mixture.encode(TEXTS, domain=domain), rtol=1e-4, atol=1e-5
    )
    assert [row["index"] for row in answer["data"]] == [0, 1, 2, 3]
    tokens = sum(len(ids) for ids in mixture.tokenizer(TEXTS)["input_ids"])
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer["object"], answer["model"]) == ("list", "enforced")


@pytest.mark.parametrize("name", ["dense", "learned"])
def test_models_without_domains_are_served(client_of, models, name):
    model = load_model(str(models / name), device="cpu")
    answer = ask(client_of(name), TEXTS, model=name, domain=...)
    np.testing.assert_allclose(vectors_of(answer), model.encode(TEXTS), rtol=1e-4, atol=1e-5)


def test_a_model_of_8_bit_integers_is_served_in_its_own_dtypes(mixture, tmp_path):
    small = moe_fast.quantize(mixture, "int8")
    small.save_pretrained(str(tmp_path / "small"), create_model_card=False)
    settings = {"model": str(tmp_path / "small"), "name": "enforced"}
    with TestClient(create_app(ServerSettings(**settings)), headers=JSON) as client:
        answer = ask(client, TEXTS)
    expected = small.encode(TEXTS, domain="law")
    np.testing.assert_allclose(vectors_of(answer), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="dtype must be None for a model of 8-bit integers"):
        create_app(ServerSettings(**settings, dtype="bfloat16"))


def test_token_ids_are_embedded_as_their_texts(client, mixture):
    ids = mixture.tokenizer(TEXTS)["input_ids"]
    expected = mixture.encode(TEXTS, domain="law")
    np.testing.assert_allclose(vectors_of(ask(client, ids)), expected, rtol=1e-4, atol=1e-5)
    one = vectors_of(ask(client, ids[0]))
    np.testing.assert_allclose(one, expected[:1], rtol=1e-4, atol=1e-5)


def test_base64_holds_the_same_floats(client):
    floats = vectors_of(ask(client))[0]
    (row,) = ask(client, encoding_format="base64")["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), floats)


def test_dimensions_cut_vectors(client, mixture):
    cut = vectors_of(ask(client, dimensions=8))
    expected = mixture.encode(["w1 w2"], domain="law", truncate_dim=8)
    np.testing.assert_allclose(cut, expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_is_put_before_texts(client, mixture):
    answer = ask(client, prompt_name="query")
    expected = mixture.encode(["w1 w2"], domain="law", prompt_name="query")
    np.testing.assert_allclose(vectors_of(answer), expected, rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut_on_request(client, mixture):
    long = "w3 " * 50
    expected = mixture.encode([long], domain="law", truncate=True)
    for given in (long, mixture.tokenizer(long)["input_ids"]):
        answer = ask(client, given, truncate=True)
        np.testing.assert_allclose(vectors_of(answer), expected, rtol=1e-4, atol=1e-5)
        assert answer["usage"]["total_tokens"] == 32


LONG = "w3 " * 50


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"text": []}, "input", "input must be a text, a list of texts"),
        ({"text": [[]]}, "input", "input must be a text, a list of texts"),
        ({"text": ["a", 1]}, "input", "input must be a text, a list of texts"),
        ({"text": None}, "input", "input must be a text, a list of texts"),
        ({"text": ["w1", "\ud800"]}, "input", "texts must be Unicode; text 1 has"),
        ({"domain": "\ud800"}, "domain", "'law', 'medicine'"),
        ({"text": ...}, "input", "Field required"),
        ({"text": [4, 60, 5]}, "input", "token ids must lie in [0, 60)"),
        ({"text": [4, -1, 5]}, "input", "token ids must lie in [0, 60)"),
        ({"text": [4, 2**70, 5]}, "input", "token ids must lie in [0, 60)"),
        ({"text": [7, 8]}, "input", "[4] first and [5] last; text 0 has [7] and [8]"),
        ({"text": [4] + [7] * 40 + [5]}, "input", "at most 32 tokens; text 0 has 42"),
        ({"text": ["w1", LONG]}, "input", "text 1 has 52"),
        ({"text": ["w1"] * 5}, "input", "input must have at most 4 texts; got 5"),
        ({"domain": "sports"}, "domain", "'law', 'medicine'"),
        ({"domain": ["law"] * 2}, "domain", "got 2 names for 1 texts"),
        ({"domain": ...}, "domain", "domain must be given"),
        ({"domain": 7}, "domain", "domain"),
        ({"dimensions": 0}, "dimensions", "dimensions must lie in [1, 32]; got 0"),
        ({"dimensions": 33}, "dimensions", "dimensions must lie in [1, 32]; got 33"),
        ({"dimensions": "8"}, "dimensions", "valid integer"),
        ({"encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"prompt_name": "q"}, "prompt_name", "document, query"),
        ({"text": [4, 7, 5], "prompt_name": "query"}, "prompt_name", "not token ids"),
        ({"colour": "red"}, "colour", "colour is no field of a request"),
        ({"truncate": "yes"}, "truncate", "valid boolean"),
    ],
)
def test_a_wrong_field_is_refused_by_name(client_of, fields, param, message):
    fields = dict(fields)
    error = ask(client_of(max_texts=4), fields.pop("text", "w1"), status=400, **fields)["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]


def test_auto_is_the_domain_that_the_model_predicts(client_of, models):
    pytest.importorskip("sklearn", reason="needs the extra moe-fast[eval]")
    mixture = load_model(str(models / "enforced"), device="cpu")
    texts = [f"w{i} w{i + 1}" for i in range(40)]
    mixture.fit_domain_predictor(texts, ["law"] * 20 + ["medicine"] * 20)
    mixture.save_pretrained(str(models / "predicting"), create_model_card=False)
    predicted = mixture.predict_domain(["w1 w2", "w38 w39"]).domains
    client = client_of("predicting")
    given = ["w1 w2", "w38 w39", "w1 w2"]
    answer = ask(client, given, model="predicting", domain=["auto", "auto", "medicine"])
    expected = mixture.encode(given, domain=[*predicted, "medicine"])
    np.testing.assert_allclose(vectors_of(answer), expected, rtol=1e-4, atol=1e-5)


def test_auto_is_refused_by_a_model_without_a_predictor(client):
    error = ask(client, "w1", domain="auto", status=400)["error"]
    assert error["param"] == "domain"
    assert "fit one with model.fit_domain_predictor" in error["message"]


def test_a_domain_is_refused_by_a_model_without(client_of):
    error = ask(client_of("dense"), model="dense", status=400)["error"]
    assert error["param"] == "domain"
    assert "has no domains" in error["message"]


def test_another_model_is_not_found(client):
    error = ask(client, model="other", status=404)["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "'enforced'" in error["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body: Field required"),
        (b"{", "the body must be JSON: "),
        (b"\xff\xfe", "the body must be JSON: "),
        (b"[1]", "the body: Input should be a valid dictionary"),
        (b'"text"', "the body: Input should be a valid dictionary"),
        (b"null", "the body: Input should be a valid dictionary"),
    ],
)
def test_a_body_that_is_no_object_is_refused(client, body, message):
    response = client.post("/v1/embeddings", content=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(message)
    assert (error["type"], error["param"]) == ("invalid_request_error", None)


def test_another_content_type_is_refused(client):
    response = client.post("/v1/embeddings", content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415
    assert "application/json; got text/plain" in response.json()["error"]["message"]


def test_a_large_body_is_refused_announced_or_not(client_of):
    client = client_of(max_body_bytes=1000)
    body = json.dumps({"model": "enforced", "input": "w1 " * 1000}).encode()
    for content in (body, iter([body[:500], body[500:]])):
        response = client.post("/v1/embeddings", content=content)
        assert response.status_code == 413
        assert "1,000 bytes" in response.json()["error"]["message"]
    ask(client)


def test_the_key_is_asked_for_where_there_is_one(client_of):
    client = client_of(api_key="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic c2VjcmV0"}):
        response = client.get("/v1/models", headers=headers)
        assert response.status_code == 401
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert "Authorization: Bearer KEY must have the server's API key" in error["message"]
        assert client.post("/v1/embeddings", json={}, headers=headers).status_code == 401
    client.headers["Authorization"] = "Bearer secret"
    ask(client)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [("GET", "/v1", 404, "Not Found"), ("PUT", "/health", 405, "Method Not Allowed")],
)
def test_other_paths_and_methods_get_the_same_kind_of_error(client, method, path, status, message):
    response = client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] == message


def test_models_says_what_is_served(client):
    (entry,) = client.get("/v1/models").json()["data"]
    created = entry.pop("created")
    assert created > 1.7e9
    assert entry == {
        "id": "enforced",
        "object": "model",
        "owned_by": "moe_fast",
        "dimensions": 32,
        "max_tokens": 32,
        "domains": DOMAINS,
        "prompts": ["document", "query"],
    }


def test_metrics_count_requests_texts_and_padding(client):
    ask(client, ["w1 w2 w3", "w4"], domain=["law", "medicine"])
    ask(client, domain="sports", status=400)
    client.post("/v1/embeddings", content=b"{")
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["moe_fast_requests_total", "200"] == 1
    assert samples["moe_fast_requests_total", "400"] == 2
    assert (
        samples["moe_fast_texts_total", "law"] == samples["moe_fast_texts_total", "medicine"] == 1
    )
    assert samples["moe_fast_padding_tokens_avoided_total",] == 2
    assert samples["moe_fast_waiting_tokens",] == 0


def test_a_text_that_cannot_be_computed_is_an_error_of_its_own(client, monkeypatch):
    model = client.app.routes  # the model is reached through the server that answers
    server = next(route.endpoint.__self__ for route in model if route.path == "/health")

    def embed(texts):
        raise ValueError("router_logits must be finite")

    monkeypatch.setattr(server.model, "embed", embed)
    error = ask(client, status=500)["error"]
    assert (error["type"], error["code"]) == ("server_error", "not_computed")
    assert "finite" in error["message"]


def test_what_no_request_is_to_blame_for_is_said_without_its_details(client, monkeypatch):
    server = next(route.endpoint.__self__ for route in client.app.routes if route.path == "/health")

    def embed(texts):
        raise RuntimeError("out of memory at 0x7f00")

    monkeypatch.setattr(server.model, "embed", embed)
    error = ask(client, status=500)["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert error["message"] == "the texts cannot be computed; the server's log says why"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_computing_thread_has_died_says_so(client, monkeypatch):
    server = next(route.endpoint.__self__ for route in client.app.routes if route.path == "/health")

    def embed(texts):
        raise SystemExit

    monkeypatch.setattr(server.model, "embed", embed)
    for _ in range(2):  # the request that was computed, and one that comes later
        error = ask(client, status=503)["error"]
        assert (error["type"], error["code"]) == ("server_error", "stopping")
        assert error["message"] == "the server's computing thread has died"
    server.batcher._thread.join(30)
    response = client.get("/health")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "the server computes nothing"


def test_a_server_that_stops_says_so(client):
    server = next(route.endpoint.__self__ for route in client.app.routes if route.path == "/health")
    server.batcher.close()
    body = json.dumps({"model": "enforced", "input": "w1", "domain": "law"})
    response = client.post("/v1/embeddings", content=body)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["message"] == "the server is stopping"
    assert client.get("/health").status_code == 503


def test_a_request_that_takes_too_long_ends(client_of, monkeypatch):
    client = client_of(timeout=0.2)
    routes = client.app.routes
    server = next(route.endpoint.__self__ for route in routes if route.path == "/health")
    hold, embed = threading.Event(), server.model.embed
    monkeypatch.setattr(server.model, "embed", lambda texts: hold.wait(30) and embed(texts))
    try:
        error = ask(client, status=503)["error"]
    finally:
        hold.set()
    assert error["code"] == "timeout"
    assert "0.2 s" in error["message"]


def test_a_full_queue_answers_429_with_retry_after(client_of, monkeypatch):
    client = client_of(timeout=0.2, max_queue_tokens=1)
    routes = client.app.routes
    server = next(route.endpoint.__self__ for route in routes if route.path == "/health")
    hold, begun, embed = threading.Event(), threading.Event(), server.model.embed

    def slowly(texts):
        begun.set()
        hold.wait(30)
        return embed(texts)

    monkeypatch.setattr(server.model, "embed", slowly)
    first = server.batcher.submit([server.model.sample()])  # is computed
    assert begun.wait(30)
    second = server.batcher.submit([server.model.sample()])  # waits
    try:
        body = json.dumps({"model": "enforced", "input": "w1", "domain": "law"})
        response = client.post("/v1/embeddings", content=body)
    finally:
        hold.set()
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert "too many texts are waiting; try again in" in error["message"]
    assert first.result(30).shape == second.result(30).shape == (1, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_texts": 0}, "max_texts must be at least 1; got 0"),
        ({"timeout": float("nan")}, "timeout must be a finite number of seconds"),
        ({"max_wait": -1}, "max_wait must be a finite number of seconds, at least 0"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        ServerSettings("model", **settings)


def test_the_description_says_what_the_model_allows(client, client_of):
    def fields(client):
        described = client.get("/openapi.json").json()
        return described["components"]["schemas"]["EmbeddingRequest"]["properties"]

    properties = fields(client)
    assert properties["model"]["enum"] == ["enforced"]
    assert properties["dimensions"]["anyOf"][0]["maximum"] == 32
    assert properties["domain"]["anyOf"][0]["enum"] == DOMAINS
    assert properties["domain"]["anyOf"][1]["items"]["enum"] == DOMAINS
    assert properties["input"]["anyOf"][2]["items"] == {
        "type": "integer",
        "minimum": 0,
        "maximum": 59,
    }
    assert fields(client_of("dense"))["domain"]["anyOf"] == [{"type": "null"}]
