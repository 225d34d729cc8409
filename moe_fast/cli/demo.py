"""``moe-fast demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_fast.cli.command import Run

EXAMPLE = "moe-fast demo --quick --output demo-output"


def run_command(
    *,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Take little data: minutes, and numbers that mean little."),
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder to write the table, the numbers and the pictures to."
        ),
    ] = Path("demo-output"),
    train_pairs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of training pairs of each variant; by default all, with --quick 250.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to compute, as PyTorch names it: cpu, cuda ...")
    ] = "cpu",
    run: Run,
) -> None:
    """Train and compare a dense model and two mixtures on documentation, offline."""
    from moe_fast.demo.__main__ import main

    arguments = ["--output", str(output), "--seed", str(run.seed), "--device", device]
    arguments += ["--quick"] if quick else []
    arguments += ["--train-pairs", str(train_pairs)] if train_pairs is not None else []
    raise typer.Exit(main(arguments))
