"""``moe-fast inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    TEXT,
    BatchSize,
    Device,
    Domain,
    DomainColumn,
    ModelArgument,
    Overwrite,
    TextColumn,
    Truncate,
    file_and_domain,
)
from moe_fast.cli.outputs import write_json
from moe_fast.messages import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXAMPLE = "moe-fast inspect mixture --texts texts.jsonl --domain-column domain -o usage.png"


def run_command(
    model: ModelArgument,
    *,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="File of texts whose tokens are counted per expert: .txt, .jsonl, .csv (each also "
            ".gz) or .parquet; DOMAIN=FILE gives its texts that domain; may be given several "
            "times.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Picture to draw of the tokens per expert: .png, .svg, .pdf, .jpg or .webp.",
        ),
    ] = None,
    json_output: Annotated[
        Path | None,
        typer.Option("--json", help="File to write all that is shown to: .json or .json.gz."),
    ] = None,
    text_column: TextColumn = TEXT,
    domain: Domain = None,
    domain_column: DomainColumn = None,
    max_texts: Annotated[
        int, typer.Option(min=1, help="Count the tokens of this many texts at most, of each file.")
    ] = 1000,
    batch_size: BatchSize = 32,
    truncate: Truncate = True,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Show a model's layers, experts, parameters and routing, and the tokens of each expert."""
    from moe_fast.cli.models import describe_model
    from moe_fast.encoding.loading import load_as_saved, load_model
    from moe_fast.files import check_output

    if output is not None and not texts:
        raise typer.BadParameter("--output draws the tokens of texts: give --texts as well")
    for path in (output, json_output):
        if path is not None:
            check_output(path, overwrite)
    files = [file_and_domain(source, domain, domain_column) for source in texts or ()]
    loaded = load_model(model, device=device) if files else load_as_saved(model)
    shown = describe_model(loaded, model)
    print("\n".join(f"{name:22} {_shown(value)}" for name, value in shown.items()))
    if files:
        rows = _read_texts(files, tuple(text_column), max_texts)
        names, usage = _usage(loaded, rows, batch_size=batch_size, truncate=truncate)
        config = loaded.transformers_model.config
        experts = expert_names(config)
        _print_usage(names, experts, usage, config.moe_layers)
        shown |= {"usage_domains": names, "usage_experts": experts, "usage": usage.tolist()}
        if output is not None:
            from moe_fast.evaluation.plots import plot_expert_usage

            label = Path(model).name
            run.save_settings(output)
            plot_expert_usage({label: usage}, names, output, layers=config.moe_layers)
            run.say(f"{output}: tokens per expert")
    if json_output is not None:
        write_json(shown, json_output)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return printable(", ".join(map(str, value))) or "none"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def _read_texts(
    files: list[tuple[Path, str | None, str | None]], columns: tuple[str, ...], most: int
) -> list[tuple[str, str | None]]:
    """Read (text, domain) of the first `most` texts of each (file, domain, column of domains)."""
    from itertools import islice

    from moe_fast.data import read_texts

    found: list[tuple[str, str | None]] = []
    for path, domain, column in files:
        rows = list(islice(read_texts(path, columns=columns, domain_column=column), most))
        if not rows:
            raise ValueError(f"{path}: no texts in this file")
        found += [(row.text, row.domain or domain) for row in rows]
    return found


def _usage(
    model: Any, rows: list[tuple[str, str | None]], **options: Any
) -> tuple[list[str], NDArray]:
    """Compute (names of the domains, shares [domain, layer, expert] of their tokens)."""
    from moe_fast.cli.models import usage_by_domain

    if not hasattr(model, "truncate"):
        raise ValueError("the model has no experts to count the tokens of; it is dense")
    named = [domain for _, domain in rows if domain is not None]
    if named and len(named) < len(rows):
        raise ValueError("--texts: either all files name their texts' domains, or none does")
    return usage_by_domain(model, [text for text, _ in rows], named, **options)


def expert_names(config: Any) -> list[str]:
    """Name the experts by their domains if routing is enforced, otherwise by number."""
    if config.routing == "enforced" and len(config.domains) == config.num_experts:
        return list(config.domains)
    return [str(expert) for expert in range(config.num_experts)]


def _print_usage(
    domains: list[str], experts: list[str], usage: NDArray, layers: Sequence[int]
) -> None:
    """Print, for each domain and layer, the share of the tokens that each expert received."""
    width = max(len("domain"), *map(len, domains))
    widths = [max(6, len(name) + 1) for name in experts]
    heads = "".join(f"{name:>{w}}" for name, w in zip(experts, widths, strict=True))
    print(f"\ntokens per expert, in percent\n  {'domain':{width}}  {'layer':5}{heads}")
    for name, of_layers in zip(domains, usage, strict=True):
        for layer, shares in zip(layers, of_layers, strict=True):
            cells = "".join(f"{100 * s:{w}.1f}" for s, w in zip(shares, widths, strict=True))
            print(f"  {name:{width}}  {layer:<5}{cells}")
