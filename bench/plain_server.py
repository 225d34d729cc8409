"""What people write first to serve a model: FastAPI, and ``encode`` for each request.

python -m bench.plain_server MODEL
"""

from __future__ import annotations

import base64
import socket
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from moe_fast.inference import load_model


class Body(BaseModel):
    """A request, as :mod:`bench.serving` sends it."""

    model: str
    input: list[str]
    domain: list[str]
    encoding_format: str


def serve(path: str) -> None:
    """Serve the model in this folder, on a free port of loopback that is printed."""
    model = load_model(path)
    app = FastAPI()

    @app.post("/v1/embeddings")
    def embeddings(body: Body) -> dict[str, Any]:
        vectors = model.encode(body.input, domain=body.domain, truncate=True)
        rows = [base64.b64encode(row.tobytes()).decode() for row in vectors]
        return {"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)]}

    model.encode("warm up", domain=model.transformers_model.config.domains[0])
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, access_log=False)).run(sockets=[listening])


if __name__ == "__main__":
    serve(sys.argv[1])
