"""Runs the application on uvicorn, in one process or in several."""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import uvicorn

from moe_fast.environment import variables
from moe_fast.serving.app import create_app
from moe_fast.serving.settings import ServerSettings

API_KEY = "MOE_FAST_API_KEY"
"""The environment variable with the key that clients must send; unset or empty: none."""

_SETTINGS = "_MOE_FAST_SERVER"  # what workers, which are new processes, are told


def serve(
    settings: ServerSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    stop_timeout: float = 60.0,
    log_level: str = "info",
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests that were taken.

    Args:
        settings: the model and the limits.
        host, port: where to listen; the default is reached from this machine alone. Port 0: one
            that is free, which the log names.
        workers: processes, each with a copy of the model; one that dies is replaced.
        stop_timeout: seconds after which a stop no longer waits for requests.
        log_level: of uvicorn's log.
        announce: told the address, once it is taken.

    Raises:
        ValueError, TypeError, OSError, ImportError: the model cannot be loaded or served.
        OSError: the address cannot be listened on.
    """
    options: dict[str, Any] = dict(
        log_level=log_level,
        access_log=False,  # /metrics counts requests
        timeout_graceful_shutdown=math.ceil(stop_timeout),
    )
    if workers > 1:
        with _told_to_workers(settings):
            uvicorn.run(
                f"{__name__}:worker_app",
                factory=True,
                workers=workers,
                host=host,
                port=port,
                **options,
            )
        return
    with _listening(host, port) as listening:  # first, since loading a model takes seconds
        host, port, *_ = listening.getsockname()
        announce(f"Listening on http://{host}:{port}; loading {settings.model}")
        uvicorn.Server(uvicorn.Config(_app(settings), **options)).run(sockets=[listening])


def worker_app() -> Any:
    """The application of one worker, as its environment says."""
    return _app(ServerSettings(**json.loads(os.environ[_SETTINGS])))


def _app(settings: ServerSettings) -> Any:
    return create_app(settings, api_key=os.environ.get(API_KEY) or None)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error


@contextmanager
def _told_to_workers(settings: ServerSettings) -> Iterator[None]:
    """Set what new processes read, and a folder in which they count together."""
    with tempfile.TemporaryDirectory(prefix="moe_fast-metrics-") as folder:
        told = {_SETTINGS: json.dumps(asdict(settings)), "PROMETHEUS_MULTIPROC_DIR": folder}
        with variables(**told):
            yield
