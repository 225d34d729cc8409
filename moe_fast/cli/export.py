"""``moe-fast export``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import ModelArgument, Output, Overwrite

EXAMPLE = "moe-fast export mixture --domain law -o law-onnx"


def run_command(
    model: ModelArgument,
    *,
    output: Output,
    format: Annotated[
        Literal["onnx"], typer.Option(help="What is written: onnx, for ONNX Runtime.")
    ] = "onnx",
    domain: Annotated[
        str | None,
        typer.Option(
            help="Write one domain's expert alone, as a dense model; by default all experts are "
            "written, and each text has its domain."
        ),
    ] = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Write a model for another runtime, with its tokenizer and pooling, and check it."""
    import moe_fast
    from moe_fast.files import atomic_folder, check_output

    check_output(output, overwrite)
    with atomic_folder(output, replaces=("*",)) as temporary:
        moe_fast.export_onnx(model, temporary, domain=domain)
        run.save_settings(temporary)
    size = sum(file.stat().st_size for file in output.iterdir())
    run.say(f"{output}: {size / 1e6:,.1f} MB, checked; load it with moe_fast.OnnxEncoder")
