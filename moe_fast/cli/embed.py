"""``moe-fast embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    TEXT,
    BatchSize,
    Device,
    Domain,
    DomainColumn,
    ModelArgument,
    Output,
    Overwrite,
    TextColumn,
    Truncate,
)

EXAMPLE = "moe-fast embed mixture texts.jsonl --domain law -o vectors.npy"


def run_command(
    model: ModelArgument,
    texts: Annotated[Path, typer.Argument(help=".txt, .jsonl, .csv (also .gz) or .parquet.")],
    *,
    output: Output,
    text_column: TextColumn = TEXT,
    domain: Domain = None,
    domain_column: DomainColumn = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Which of the model's prompts goes in front of each text.")
    ] = None,
    batch_size: BatchSize = 32,
    chunk_size: Annotated[
        int, typer.Option(min=1, help="Texts that are kept together when the run is interrupted.")
    ] = 1024,
    processes: Annotated[int, typer.Option(min=1, help="Each holds a copy of the model.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Per process.")] = None,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of the vectors.")] = (
        "float32"
    ),
    normalize: Annotated[bool, typer.Option(help="Scale every vector to length 1.")] = False,
    truncate: Truncate = False,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Embed every text of a file, of any size, into .npy or .parquet.

    A run that was interrupted goes on where it stopped when it is started again with the same
    settings, and ends with the same bytes.
    """
    from moe_fast.inference.embed import embed_file
    from moe_fast.inference.encoder import EncoderSettings

    settings = EncoderSettings(
        model=model,
        domain=domain,
        prompt_name=prompt_name,
        batch_size=batch_size,
        dtype=dtype,
        normalize=normalize,
        truncate=truncate,
        device=device,
    )
    embedded = embed_file(
        texts,
        output,
        settings,
        columns=tuple(text_column),
        domain_column=domain_column,
        chunk_size=chunk_size,
        processes=processes,
        threads=threads,
        overwrite=overwrite,
        progress=not run.quiet,
    )
    run.save_settings(output)
    resumed = f", {embedded.resumed_rows:,} of them from before" if embedded.resumed_rows else ""
    run.say(f"{output}: {embedded.rows:,} x {embedded.dimension}{resumed}")
