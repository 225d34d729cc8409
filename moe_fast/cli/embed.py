"""``moe-fast embed``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    MOST_THREADS,
    TEXT,
    BatchSize,
    Delimiter,
    Device,
    Domain,
    DomainColumn,
    ModelArgument,
    Overwrite,
    SkipInvalid,
    TextColumn,
    TextColumns,
    Truncate,
    check_delimiter,
    file_and_reading,
    text_reading,
)

EXAMPLE = "moe-fast embed mixture texts.jsonl --domain law -o vectors.npy"


def run_command(
    model: ModelArgument,
    texts: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="File of texts, .txt (one per line), .jsonl, .csv (each also .gz) or .parquet; "
            "DOMAIN=FILE gives all of its texts that domain. With --engine ray, a .parquet file or "
            "a folder of such files.",
        ),
    ],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="File to write: .npy, with the ids in FILE.npy.ids.jsonl beside it, or .parquet, "
            "with columns id and embedding. With --engine ray, a folder of .parquet files.",
        ),
    ],
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(
            help="What runs the processes: this program, or Ray, on this machine or on a cluster."
        ),
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster, or 'auto'; by default one is started on this machine "
            "for this run."
        ),
    ] = None,
    text_column: TextColumn = TEXT,
    domain: Domain = None,
    domain_column: DomainColumn = None,
    columns: TextColumns = None,
    delimiter: Delimiter = None,
    skip_invalid: SkipInvalid = False,
    prompt_name: Annotated[
        str | None,
        typer.Option(
            help="Name of the model's prompt to put in front of each text; by default "
            "the model's default prompt, where it has one."
        ),
    ] = None,
    batch_size: BatchSize = 32,
    chunk_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Texts that are computed and saved together; a kill loses one such chunk per "
            "process.",
        ),
    ] = 1024,
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Processes that embed at the same time; each holds a copy of the model.",
        ),
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Threads of each process; by default PyTorch's number divided by --processes; at "
            "--ray-address 1.",
        ),
    ] = None,
    precision: Annotated[
        Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"],
        typer.Option(
            help="What is stored of a number: 4 or 2 bytes; a byte, the step between the least and "
            "the greatest value of its dimension among all texts; or a bit, its sign. The last "
            "four need .parquet."
        ),
    ] = "float32",
    normalize: Annotated[
        bool,
        typer.Option(
            "--normalize/--no-normalize",
            help="Scale every vector to length 1, so that dot products are cosines.",
        ),
    ] = False,
    truncate: Truncate = True,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Embed every text of a file, of any size, into .npy or .parquet, or a folder with Ray.

    A run that was interrupted goes on where it stopped when it is started again with the same
    settings, and ends with the same bytes.
    """
    from moe_fast.inference.embed import embed_file
    from moe_fast.inference.text_encoder import EncoderSettings

    reading = text_reading(columns, text_column, domain_column, skip_invalid)
    source, domain, reading = file_and_reading(texts, domain, reading, delimiter)
    check_delimiter(delimiter, [str(source)])
    settings = EncoderSettings(
        model=model,
        domain=domain,
        prompt_name=prompt_name,
        batch_size=batch_size,
        normalize=normalize,
        truncate=truncate,
        device=device,
    )
    if ray_address is None:
        for flag, count in (("--threads", threads), ("--processes", processes)):
            if count is not None and count > MOST_THREADS:
                raise typer.BadParameter(
                    f"at most {MOST_THREADS} on this machine; got {count}", param_hint=f"'{flag}'"
                )
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "threads": threads,
        "precision": precision,
        "overwrite": overwrite,
        "progress": not run.quiet,
        "finish": partial(run.save_settings, output, beside=True),
    }
    if engine == "ray":
        from moe_fast.distributed import embed_corpus

        if skip_invalid:
            raise typer.BadParameter("--skip-invalid is for --engine local")
        embedded = embed_corpus(
            source,
            output,
            settings,
            **{name: reading[name] for name in ("columns", "domain_column", "id_column")},
            workers=processes,
            address=ray_address,
            **options,
        )
    else:
        if ray_address is not None:
            raise typer.BadParameter("--ray-address is for --engine ray")
        embedded = embed_file(source, output, settings, **reading, processes=processes, **options)
    resumed = f", {embedded.resumed_rows:,} of them from before" if embedded.resumed_rows else ""
    run.say(f"{output}: {embedded.rows:,} x {embedded.dimension}{resumed}")
