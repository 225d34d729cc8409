"""A running server and clients of all kinds: real ones, many, gone, silent and hostile."""

import http.client
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from moe_fast.serving import ServerSettings, create_app
from tests.serving.conftest import running
from tests.serving.tiny import DOMAINS

JSON = {"Content-Type": "application/json"}
HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


def post(url, body):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/embeddings", body=json.dumps(body), headers=JSON)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_the_openai_client_works_unchanged(url, mixture):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.embeddings.create(
        model="enforced", input=["w1 w2", "w3"], extra_body={"domain": ["law", "medicine"]}
    )
    expected = mixture.encode(["w1 w2", "w3"], domain=["law", "medicine"])
    vectors = np.array([row.embedding for row in answer.data])
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)
    assert [model.id for model in client.models.list()] == ["enforced"]
    with pytest.raises(openai.BadRequestError, match="domain must be given"):
        client.embeddings.create(model="enforced", input="w1")
    with pytest.raises(openai.NotFoundError, match="enforced"):
        client.embeddings.create(model="text-embedding-3-small", input="w1")


def test_the_langchain_client_works(url, mixture):
    langchain = pytest.importorskip("langchain_openai")
    client = langchain.OpenAIEmbeddings(
        base_url=f"{url}/v1",
        api_key="none",
        model="enforced",
        check_embedding_ctx_length=False,  # it would send another tokenizer's ids
        model_kwargs={"extra_body": {"domain": "law"}},
    )
    vectors = client.embed_documents(["w1 w2", "w3"])
    expected = mixture.encode(["w1 w2", "w3"], domain="law")
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)


def test_many_clients_at_once_each_get_their_own_vectors(url, mixture):
    draw = random.Random(0)
    requests = []
    for _ in range(100):
        texts = [
            " ".join(f"w{draw.randrange(54)}" for _ in range(draw.randint(1, 25)))
            for _ in range(draw.choice([1, 1, 1, 2, 7]))
        ]
        requests.append((texts, [draw.choice(DOMAINS) for _ in texts]))

    def embed(request):
        texts, domains = request
        status, answer = post(url, {"model": "enforced", "input": texts, "domain": domains})
        assert status == 200, answer
        return [row["embedding"] for row in answer["data"]]

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(embed, requests))
    for (texts, domains), vectors in zip(requests, answers, strict=True):
        expected = mixture.encode(texts, domain=domains)
        np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-5)


def test_a_client_that_stops_sending_gets_408_and_holds_up_nobody(models):
    app = create_app(ServerSettings(str(models / "enforced"), body_timeout=0.5))
    with running(app) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as silent:
            silent.sendall(HEAD % 99 + b"{")
            status, _ = post(url, {"model": "enforced", "input": "w1", "domain": "law"})
            assert status == 200
            answer = silent.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408")
            assert b"within 0.5 s" in answer or b"within 0.5 s" in silent.recv(65536)


def test_garbage_gets_400_and_harms_nobody(url):
    host, port = url.removeprefix("http://").split(":")
    for garbage in (b"\x00\xff" * 100 + b"\r\n\r\n", b"GET\r\n\r\n"):
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(garbage)
            assert client.recv(65536).startswith(b"HTTP/1.1 400")
    status, _ = post(url, {"model": "enforced", "input": "w1", "domain": "law"})
    assert status == 200


def test_a_client_that_leaves_takes_its_texts_out_of_the_queue(models):
    app = create_app(ServerSettings(str(models / "enforced"), max_batch_tokens=1))
    server = next(r.endpoint.__self__ for r in app.routes if getattr(r, "path", "") == "/health")
    embed = server.model.embed
    embedded = []

    def slowly(texts):
        time.sleep(0.02)
        embedded.append(len(texts))
        return embed(texts)

    server.model.embed = slowly
    with running(app) as url:
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps({"model": "enforced", "input": ["w1"] * 1000, "domain": "law"}).encode()
        with socket.create_connection((host, int(port)), timeout=30) as client:
            client.sendall(HEAD % len(body) + body)
            while server.batcher.waiting_tokens == 0:
                time.sleep(0.01)
        status, _ = post(url, {"model": "enforced", "input": "w1", "domain": "law"})
        assert status == 200
        assert server.batcher.waiting_tokens == 0
    assert len(embedded) < 500
