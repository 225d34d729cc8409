"""``moe-fast quantize``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    TEXT,
    Domain,
    DomainColumn,
    ModelArgument,
    Output,
    Overwrite,
    TextColumn,
    file_and_domain,
)

EXAMPLE = "moe-fast quantize mixture --texts texts.jsonl --domain-column domain -o small"


def run_command(
    model: ModelArgument,
    *,
    output: Output,
    method: Annotated[
        Literal["int8"], typer.Option(help="What the weights become: int8, 8-bit integers.")
    ] = "int8",
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="File of sample texts, some hundreds: .txt (one per line), .jsonl, .csv (each "
            "also .gz) or .parquet. They fix the range of the activations; by default each token "
            "has its own, which is more exact.",
        ),
    ] = None,
    text_column: TextColumn = TEXT,
    domain: Domain = None,
    domain_column: DomainColumn = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Make a mixture of 8-bit integers: smaller, and faster on a CPU."""
    import moe_fast
    from moe_fast.cli.models import describe_size, save_converted
    from moe_fast.data import read_texts
    from moe_fast.encoding.loading import load_as_saved
    from moe_fast.files import check_output

    if texts is None and (domain is not None or domain_column is not None):
        raise typer.BadParameter("--domain and --domain-column need --texts")
    check_output(output, overwrite)
    mixture = load_as_saved(model)
    options: dict[str, Any] = {}
    if texts is not None:
        path, domain, domain_column = file_and_domain(texts, domain, domain_column)
        rows = list(read_texts(path, columns=tuple(text_column), domain_column=domain_column))
        options["texts"] = [row.text for row in rows]
        options["domain"] = domain if domain_column is None else [row.domain for row in rows]
    quantized = moe_fast.quantize(mixture, method, **options)
    save_converted(quantized, output, model, run)
    run.say(f"{output}: {describe_size(quantized)}")
