"""Asks NCBI's Entrez service by Biopython's client, and asks again where it fails.

Biopython builds the requests and keeps NCBI's limits: three requests per second, ten with an API
key. It would try again at once after an error, three times; here the pauses grow, and the service's
``Retry-After`` is kept.

No answer is read as XML. Biopython's parser of XML follows the DTD that an answer names, over the
network; JSON and the Medline text format have no entities and name no other files.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError

from moe_fast.extras import require
from moe_fast.messages import reason, shown

TRIES = 6  # per request
FIRST_PAUSE = 1.0  # seconds, doubled before each further try
LONGEST_PAUSE = 300.0  # seconds; a service that asks for more is left alone
TIMEOUT = 60.0  # seconds without a byte
MAX_BYTES = 1 << 26  # of an answer
_TOOL = "moe_fast"  # how requests name their program, as NCBI asks
_TRY_AGAIN = (408, 429)  # besides all from 500

Answer = TypeVar("Answer")


class ServiceError(RuntimeError):
    """The service did not answer, although it was asked several times."""


class Refused(ServiceError):
    """The service answers, but not with what it was asked for."""


class BadAnswer(ValueError):
    """An answer that is incomplete, is no answer to the question, or reports an error."""


@dataclass(frozen=True)
class EntrezClient:
    """Sends requests to Entrez one after the other, in the name of one user.

    Attributes:
        email: the user's address, by which NCBI can reach whoever sends too many requests.
        api_key: NCBI's key of this user; it allows ten requests per second instead of three.
        wait: waits for a number of seconds.
    """

    email: str
    api_key: str | None = field(default=None, repr=False)
    wait: Callable[[float], None] = time.sleep

    def ask(self, utility: str, read: Callable[[str], Answer], **parameters: Any) -> Answer:
        """Send a request, at most `TRIES` times, and return what `read` makes of the answer.

        Args:
            utility: the name of the E-utility, such as "esearch".
            read: takes the text of an answer; raises `BadAnswer` if that is not whole.
            parameters: of the request, besides the tool, email and API key.

        Raises:
            Refused: the request is refused (HTTP 4xx), or no answer was whole.
            ServiceError: the service failed or could not be reached, or wants to be left alone.
            ImportError: biopython is not installed.
        """
        for attempt in range(TRIES):
            pause, kind = FIRST_PAUSE * 2**attempt, ServiceError
            try:
                return read(self._answer(utility, parameters))
            except HTTPError as error:
                problem = self._of_status(error)
                if error.code < 500 and error.code not in _TRY_AGAIN:
                    raise Refused(f"{utility} was refused: {problem}") from error
                pause = max(pause, _retry_after(error.headers.get("Retry-After")))
                if pause > LONGEST_PAUSE:
                    raise ServiceError(
                        f"{utility}: {problem}; the service asks to wait for {pause:,.0f} s"
                    ) from error
            except BadAnswer as error:
                problem, kind = self._without_key(reason(error)), Refused
            except (OSError, HTTPException) as error:
                problem = self._without_key(reason(error)) or type(error).__name__
            if attempt < TRIES - 1:
                self.wait(pause)
        raise kind(f"{utility} failed {TRIES} times, the last time with: {problem}")

    def _answer(self, utility: str, parameters: dict[str, Any]) -> str:
        """Send one request and return the text of its answer.

        Raises:
            BadAnswer: the answer is too long or incomplete, or is not UTF-8.
            HTTPError, OSError, HTTPException: as urllib.
        """
        library = require("Bio.Entrez", "papers", "fetching papers")
        call = getattr(library, utility)
        user = {"tool": _TOOL, "email": self.email, "api_key": self.api_key}
        with _one_try(library), call(**parameters, **user) as handle:
            response = getattr(handle, "buffer", handle)  # Biopython wraps plain text
            body = response.read(MAX_BYTES + 1)
            if len(body) > MAX_BYTES:
                raise BadAnswer(f"an answer of more than {MAX_BYTES:,} bytes")
            if response.length:  # read(n) reports no end that comes too early
                raise BadAnswer(f"an answer that lacks its last {response.length:,} bytes")
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadAnswer(f"an answer that is not UTF-8 ({error})") from error

    def _of_status(self, error: HTTPError) -> str:
        """Describe an answer whose status reports an error."""
        try:
            body = error.read(2000).decode("utf-8", "replace")
        except (OSError, HTTPException):
            body = ""
        error.close()
        text = reason(ValueError(body)) if body.strip() else "no explanation"
        return self._without_key(f"HTTP status {error.code} ({text})")

    def _without_key(self, text: str) -> str:
        """Remove the API key, which the service repeats in some errors."""
        return text.replace(self.api_key, "...") if self.api_key else text


def read_json(text: str) -> dict[str, Any]:
    """Read an answer in JSON.

    Raises:
        BadAnswer: it is no JSON object, or is one that reports an error.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"an answer that is no whole JSON: {shown(text)}") from error
    if not isinstance(found, dict):
        raise BadAnswer(f"an answer that is no JSON object: {shown(found)}")
    refuse_error(found)
    return found


def refuse_error(part: dict[str, Any]) -> None:
    """Raise BadAnswer if this part of an answer reports an error, as the service does in a 200."""
    for name in ("error", "ERROR"):
        if part.get(name):
            raise BadAnswer(f"an error in the answer: {shown(part[name], 200)}")


@contextmanager
def _one_try(library: Any) -> Iterator[None]:
    """Let Biopython send one request within the block, and give up on a silent server.

    Biopython has no arguments for either; both settings are again what they were.
    """
    tries, timeout = library.max_tries, socket.getdefaulttimeout()
    library.max_tries = 1
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        library.max_tries = tries
        socket.setdefaulttimeout(timeout)


def _retry_after(value: str | None) -> float:
    """Return the seconds of a ``Retry-After`` header, which may also be a date; else 0."""
    if value is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}", value.strip()):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
