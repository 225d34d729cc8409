"""``moe-fast serve``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import MOST_THREADS, Device, ModelArgument, option

EXAMPLE = "moe-fast serve mixture --port 8000"

_LIMITS = "Limits"


def run_command(
    model: ModelArgument,
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; the default serves this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="Name by which requests ask for the model; by default its folder's."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(min=1, max=MOST_THREADS, help="Processes; each holds a copy of the model."),
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_THREADS, help="Threads of each process; by default PyTorch's number."
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Dtype to compute in; by default the model's own."),
    ] = None,
    device: Device = None,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate/--no-truncate",
            help="Cut texts that are too long, if the request does not say; otherwise they are an "
            "error.",
        ),
    ] = False,
    max_batch_tokens: Annotated[
        int, option(_LIMITS, "Tokens computed together, of all requests.", min=1)
    ] = 8192,
    max_wait: Annotated[
        float,
        option(_LIMITS, "Seconds that a batch waits for more requests while many come.", min=0),
    ] = 0.002,
    max_texts: Annotated[int, option(_LIMITS, "Texts in one request.", min=1)] = 2048,
    max_body_bytes: Annotated[int, option(_LIMITS, "Bytes of one request.", min=1)] = 16 << 20,
    max_queue_tokens: Annotated[
        int, option(_LIMITS, "Waiting tokens from which on requests are refused (429).", min=1)
    ] = 1 << 18,
    timeout: Annotated[
        float, option(_LIMITS, "Seconds after which a request ends with an error.", min=0.001)
    ] = 60.0,
    body_timeout: Annotated[
        float, option(_LIMITS, "Seconds within which a request must arrive.", min=0.001)
    ] = 10.0,
    stop_timeout: Annotated[
        float, option(_LIMITS, "Seconds that a stop waits for running requests.", min=0)
    ] = 60.0,
    run: Run,
) -> None:
    """Serve embeddings over HTTP, by OpenAI's protocol, with a domain for each text.

    The environment variable MOE_FAST_API_KEY sets the key that clients must send. SIGINT and
    SIGTERM stop the server when it has answered the requests it took.
    """
    from moe_fast.extras import require

    require("fastapi", "serve", "moe-fast serve")
    from moe_fast.serving.server import serve
    from moe_fast.serving.settings import ServerSettings

    settings = ServerSettings(
        model=model,
        name=name,
        dtype=dtype,
        device=device,
        threads=threads,
        truncate=truncate,
        max_batch_tokens=max_batch_tokens,
        max_wait=max_wait,
        max_texts=max_texts,
        max_body_bytes=max_body_bytes,
        max_queue_tokens=max_queue_tokens,
        timeout=timeout,
        body_timeout=body_timeout,
    )
    serve(
        settings,
        host=host,
        port=port,
        workers=workers,
        stop_timeout=stop_timeout,
        log_level="warning" if run.quiet else "info",
        announce=run.say,
    )
