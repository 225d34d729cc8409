"""Tiny models, and servers of them on loopback."""

import contextlib
import json
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra moe-fast[serve]")
pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")

import uvicorn
from starlette.testclient import TestClient

import moe_fast
from moe_fast.serving import ServerSettings, create_app
from tests.serving.tiny import save_models


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with ``dense``, ``enforced`` (two domains, experts that differ) and ``learned``."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def mixture(models):
    return moe_fast.MoESentenceTransformer(str(models / "enforced"), device="cpu")


@pytest.fixture
def client_of(models):
    """Returns a client of an application made with these settings; all end with the test."""
    with contextlib.ExitStack() as stack:

        def make(name="enforced", *, api_key=None, **settings):
            app = create_app(ServerSettings(str(models / name), **settings), api_key=api_key)
            headers = {"Content-Type": "application/json"}
            client = TestClient(app, raise_server_exceptions=False, headers=headers)
            return stack.enter_context(client)

        yield make


@pytest.fixture
def client(client_of):
    return client_of()


@contextlib.contextmanager
def running(app):
    """Serve an application on a free port of loopback; yields its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def url(models):
    """A running server of the mixture with domains."""
    with running(create_app(ServerSettings(str(models / "enforced")))) as url:
        yield url


def ask(client, text="w1 w2", status=200, **fields):
    """POST a request for embeddings; return its answer's JSON."""
    body = {"model": "enforced", "input": text, "domain": "law", **fields}
    body = {name: value for name, value in body.items() if value is not ...}
    response = client.post("/v1/embeddings", content=json.dumps(body))
    assert response.status_code == status, response.text
    return response.json()
