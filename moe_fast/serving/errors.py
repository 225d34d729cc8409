"""Errors of requests, in the form of OpenAI's answers."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from moe_fast.messages import printable

_LONGEST = 1000

# What a client may rely on: a type for each status.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        message: what is wrong, what was given and what is allowed.
        param: the field of the request, or ``None``.
        status: HTTP's status.
        code: a short name of the error, as OpenAI's codes, or ``None``.
        headers: HTTP headers of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        # What a client sent may be in it.
        self.message = printable(message[:_LONGEST])
        self.param = None if param is None else printable(param[:_LONGEST])
        self.status = status
        self.code = code
        self.headers = headers

    def response(self) -> JSONResponse:
        """The answer to send."""
        return JSONResponse(self.body(), self.status, self.headers)

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = _TYPES.get(self.status, "server_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }
