"""The application: OpenAI's protocol for embeddings, with domains, and what operators ask for."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import orjson
import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from moe_fast.encoding.lengths import TokenizedText
from moe_fast.malloc import malloc_trim
from moe_fast.messages import shown
from moe_fast.serving.batcher import Batcher, ClosedError, QueueFullError, Text, Vectors
from moe_fast.serving.errors import RequestError
from moe_fast.serving.limits import BodyLimits
from moe_fast.serving.metrics import CountedRequests, Metrics
from moe_fast.serving.model import ServedModel
from moe_fast.serving.requests import (
    INPUT_FORMS,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorResponse,
    ModelList,
    answer,
)
from moe_fast.serving.settings import ServerSettings
from moe_fast.version import __version__

logger = logging.getLogger(__name__)

# Texts of fewer characters are tokenized at once: handing them to a thread would take longer.
_FEW_CHARACTERS = 4096

TRIM_EVERY = 2.0
"""Seconds between two returns of freed memory to the system."""

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A field is wrong; the message names it."},
    401: {"model": ErrorResponse, "description": "The API key is missing or wrong."},
    404: {"model": ErrorResponse, "description": "There is no such model."},
    408: {"model": ErrorResponse, "description": "The body did not arrive in time."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    415: {"model": ErrorResponse, "description": "The body is not announced as JSON."},
    429: {"model": ErrorResponse, "description": "Too many texts wait; see Retry-After."},
    500: {"model": ErrorResponse, "description": "A text cannot be computed."},
    503: {
        "model": ErrorResponse,
        "description": "The server stops, computes no more, or took too long.",
    },
}


def create_app(settings: ServerSettings, *, api_key: str | None = None) -> FastAPI:
    """Load the model and make the application that serves it.

    Args:
        settings: the model and the limits.
        api_key: what clients must send as ``Authorization: Bearer ...`` for /v1; ``None``: nothing.

    Raises:
        ValueError, TypeError, OSError, ImportError: the model cannot be loaded or served.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return _Server(settings, ServedModel(settings), api_key).app


class _Server:
    """One model, its queue, and the functions that answer requests."""

    def __init__(self, settings: ServerSettings, model: ServedModel, api_key: str | None) -> None:
        self.settings = settings
        self.model = model
        self.metrics = Metrics()
        self.started = int(time.time())
        self.batcher: Batcher | None = None
        self._trim, self._next_trim = malloc_trim(), 0.0
        self.app = FastAPI(
            title="moe_fast",
            version=__version__,
            lifespan=self.lifespan,
            docs_url=None,
            redoc_url=None,
        )
        key = [Depends(_check_key(api_key))]
        add = self.app.add_api_route
        add(
            "/v1/embeddings",
            self.embeddings,
            methods=["POST"],
            dependencies=key,
            response_model=EmbeddingResponse,
            responses=_REFUSALS,
        )
        add(
            "/v1/models",
            self.models,
            dependencies=key,
            response_model=ModelList,
            responses={401: _REFUSALS[401]},
        )
        add("/health", self.health, responses={503: _REFUSALS[503]})
        add(
            "/metrics",
            self.metrics_page,
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}}},
        )
        self.app.openapi = self.openapi  # type: ignore[method-assign]
        self.app.add_exception_handler(RequestValidationError, _on_invalid)
        self.app.add_exception_handler(RequestError, _on_refused)
        self.app.add_exception_handler(HTTPException, _on_http_error)
        self.app.add_middleware(
            BodyLimits, max_bytes=settings.max_body_bytes, seconds=settings.body_timeout
        )
        self.app.add_middleware(CountedRequests, metrics=self.metrics, path="/v1/embeddings")

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Compute from here on; at the end, finish what was taken."""
        self.batcher = Batcher(
            self.embed,
            max_batch_tokens=self.settings.max_batch_tokens,
            max_queue_tokens=self.settings.max_queue_tokens,
            max_wait=self.settings.max_wait,
            observe=self.observe,
        )
        await asyncio.wrap_future(self.batcher.submit([self.model.sample()]))  # the first is slow
        yield
        await asyncio.to_thread(self.batcher.close)
        self.batcher = None

    def embed(self, texts: Sequence[Text]) -> Vectors:
        """Embed a batch, and count its tokens."""
        vectors = self.model.embed(texts)
        lengths = [len(text.ids) for text in texts]
        self.metrics.batches.inc()
        self.metrics.tokens.inc(sum(lengths))
        self.metrics.padding_avoided.inc(max(lengths) * len(lengths) - sum(lengths))
        self._trim_memory()
        return vectors

    def _trim_memory(self) -> None:
        """Give freed memory back now and then: batches of ever other sizes leave gaps in it."""
        if self._trim is not None and time.monotonic() >= self._next_trim:
            self._trim(0)
            self._next_trim = time.monotonic() + TRIM_EVERY

    def observe(self, texts: int, requests: int) -> None:
        """Count the texts and requests of a batch."""
        self.metrics.batch_texts.observe(texts)
        self.metrics.batch_requests.observe(requests)

    def openapi(self) -> dict[str, Any]:
        """The description of this server: what FastAPI knows, and what the model allows."""
        if self.app.openapi_schema is None:
            described = FastAPI.openapi(self.app)
            fields = described["components"]["schemas"]["EmbeddingRequest"]["properties"]
            self.model.describe(fields)
            for path in described["paths"].values():
                for operation in path.values():  # FastAPI's own answer, which is never given
                    operation["responses"].pop("422", None)
        return self.app.openapi_schema or {}

    # --- answers ----------------------------------------------------------------------------------

    async def embeddings(self, body: EmbeddingRequest, request: Request) -> Response:
        """Embed texts."""
        if body.model != self.model.name:
            raise RequestError(
                f"model must be {self.model.name!r}, the one offered here; got {shown(body.model)}",
                "model",
                status=404,
                code="model_not_found",
            )
        self.model.check_dimension(body.dimensions)
        given = _texts_or_ids(body.input)
        if len(given) > self.settings.max_texts:
            raise RequestError(
                f"input must have at most {self.settings.max_texts} texts; got {len(given)}",
                "input",
            )
        names = self.model.domain_names(body.domain, len(given))
        if sum(len(one) for one in given) <= _FEW_CHARACTERS:
            tokenized = self._tokenized(given, body)
        else:
            tokenized = await asyncio.to_thread(self._tokenized, given, body)
        prompt_length = self.model.prompt_length(body.prompt_name)
        domain_ids = self.model.domain_ids(names, tokenized)
        texts = [
            Text(one.ids, one.type_ids, domain_id, prompt_length)
            for one, domain_id in zip(tokenized, domain_ids, strict=True)
        ]
        vectors = await self._computed(texts, request)
        if vectors is None:
            return Response(status_code=499)  # nobody reads it: the client is gone
        self._count_domains(domain_ids)
        vectors = self.model.shortened(vectors, body.dimensions)
        tokens = sum(len(text.ids) for text in texts)
        content = answer(vectors, self.model.name, tokens, body.encoding_format)
        return Response(
            orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json"
        )

    def _tokenized(
        self, given: list[str] | list[list[int]], body: EmbeddingRequest
    ) -> list[TokenizedText]:
        truncate = self.settings.truncate if body.truncate is None else body.truncate
        if isinstance(given[0], str):
            return self.model.tokenize(given, body.prompt_name, truncate)  # type: ignore[arg-type]
        if body.prompt_name is not None:
            raise RequestError(
                "prompt_name needs texts, not token ids, which contain what stands before them",
                "prompt_name",
            )
        return [self.model.check_ids(ids, i, truncate) for i, ids in enumerate(given)]

    async def _computed(self, texts: Sequence[Text], request: Request) -> Vectors | None:
        """The vectors of a request's texts; ``None`` if the client has left meanwhile."""
        future = self._submit(texts)
        computed = asyncio.wrap_future(future)
        gone = asyncio.create_task(_client_left(request))
        either: set[asyncio.Future[Any]] = {computed, gone}
        try:
            await asyncio.wait(
                either,
                timeout=self.settings.timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if computed.done():
                return await computed
            if gone.done():
                return None
            raise RequestError(
                f"not computed within {self.settings.timeout:g} s",
                status=503,
                code="timeout",
                headers={"Retry-After": "1"},
            )
        except ClosedError as error:
            raise _not_now(error) from error
        except ValueError as error:  # such as a router that computes NaN for a text
            raise RequestError(str(error), "input", status=500, code="not_computed") from error
        except RequestError:
            raise
        except Exception as error:  # such as a device without memory
            logger.exception("A request cannot be computed.")
            raise RequestError(
                "the texts cannot be computed; the server's log says why",
                status=500,
                code="internal_error",
            ) from error
        finally:
            computed.cancel()
            gone.cancel()

    def _submit(self, texts: Sequence[Text]) -> Future[Vectors]:
        try:
            if self.batcher is None:
                raise ClosedError("the server is stopping")
            return self.batcher.submit(texts)
        except QueueFullError as error:
            raise RequestError(
                str(error),
                status=429,
                code="queue_full",
                headers={"Retry-After": str(error.retry_after)},
            ) from error
        except ClosedError as error:
            raise _not_now(error) from error

    def _count_domains(self, domain_ids: Sequence[int | None]) -> None:
        for domain_id in set(domain_ids):
            name = "none" if domain_id is None else self.model.domains[domain_id]
            self.metrics.texts.labels(name).inc(domain_ids.count(domain_id))

    async def models(self) -> dict[str, Any]:
        """List the model."""
        model = self.model
        entry = {
            "id": model.name,
            "object": "model",
            "created": self.started,
            "owned_by": "moe_fast",
            "dimensions": model.dimension,
            "max_tokens": model.max_length,
            "domains": model.domains,
            "prompts": sorted(model.prompts),
        }
        return {"object": "list", "data": [entry]}

    async def health(self) -> dict[str, str]:
        """Say whether requests are taken."""
        if self.batcher is None or not self.batcher.is_alive:
            raise RequestError("the server computes nothing", status=503, code="stopping")
        return {"status": "ok"}

    async def metrics_page(self) -> Response:
        """All metrics, for Prometheus."""
        if self.batcher is not None:
            self.metrics.waiting_tokens.set(self.batcher.waiting_tokens)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _not_now(error: ClosedError) -> RequestError:
    return RequestError(str(error), status=503, code="stopping", headers={"Retry-After": "1"})


def _texts_or_ids(given: Any) -> Any:
    """``input`` as a list of texts, or a list of lists of ids."""
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return given


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_key(api_key: str | None) -> Any:
    """A dependency that refuses requests without the key, if there is one."""
    bearer = HTTPBearer(auto_error=False)

    async def check(given: HTTPAuthorizationCredentials | None = Depends(bearer)) -> None:  # noqa: B008
        if api_key is None:
            return
        sent = "" if given is None else given.credentials
        if not hmac.compare_digest(sent.encode(), api_key.encode()):
            raise RequestError(
                "the header Authorization: Bearer KEY must have the server's API key",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def no_check() -> None:
        return

    return no_check if api_key is None else check


async def _on_refused(request: Request, error: Any) -> JSONResponse:
    return error.response()


async def _on_http_error(request: Request, error: Any) -> JSONResponse:
    refused = RequestError(str(error.detail), status=error.status_code, headers=error.headers)
    return refused.response()


async def _on_invalid(request: Request, error: Any) -> JSONResponse:
    """A body that does not fit the description: 400, as OpenAI answers, with the field's name."""
    kind = request.headers.get("content-type", "none")
    if kind.partition(";")[0].strip().lower() != "application/json":
        message = f"the header Content-Type must be application/json; got {kind}"
        return RequestError(message, status=415).response()
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    param = str(place[0]) if place and isinstance(place[0], str) else None
    if first["type"] == "json_invalid":
        message, param = f"the body must be JSON: {first['ctx']['error']}", None
    elif param == "input" and first["type"] != "missing":
        message = f"input must be {INPUT_FORMS}"
    elif first["type"] == "extra_forbidden":
        known = ", ".join(EmbeddingRequest.model_fields)
        message = f"{param} is no field of a request, which are: {known}"
    else:
        message = f"{'.'.join(map(str, place)) or 'the body'}: {first['msg']}"
    return RequestError(message, param).response()
