"""Limits on what a client sends, before anything reads it: bytes, and seconds."""

from __future__ import annotations

import asyncio
from typing import Any

from moe_fast.serving.errors import RequestError

_CLOSE = {"Connection": "close"}  # the rest of the body would be taken for the next request


class BodyLimits:
    """An ASGI application that refuses bodies which are too large (413) or too slow (408).

    Args:
        app: the application behind it.
        max_bytes: the most bytes in a body.
        seconds: the time from its first byte to its last.
    """

    def __init__(self, app: Any, max_bytes: int, seconds: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        try:
            body = await self._body(receive)
        except RequestError as error:
            await error.response()(scope, receive, send)
            return
        first = {"type": "http.request", "body": body, "more_body": False}
        messages = iter([first])

        async def replay() -> Any:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive: Any) -> bytes:
        """Receive a whole body, or raise RequestError."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                more = True
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.max_bytes:
                        raise self._too_large()
        except TimeoutError:
            raise RequestError(
                f"the request's body must arrive within {self.seconds:g} s",
                status=408,
                code="slow_body",
                headers=_CLOSE,
            ) from None
        return bytes(body)

    def _too_large(self) -> RequestError:
        return RequestError(
            f"a request must have at most {self.max_bytes:,} bytes",
            status=413,
            code="too_large",
            headers=_CLOSE,
        )
