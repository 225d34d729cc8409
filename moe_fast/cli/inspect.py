"""``moe-fast inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_fast.cli.command import Run, printable
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
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXAMPLE = "moe-fast inspect mixture --texts texts.jsonl --domain-column domain -o usage.png"
_ALL = "all texts"


def run_command(
    model: ModelArgument,
    *,
    texts: Annotated[
        Path | None, typer.Option(help="Texts whose tokens are counted per expert.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Picture of the tokens per expert.")
    ] = None,
    json_output: Annotated[
        Path | None, typer.Option("--json", help="File to write all that is shown to.")
    ] = None,
    text_column: TextColumn = TEXT,
    domain: Domain = None,
    domain_column: DomainColumn = None,
    max_texts: Annotated[
        int, typer.Option(min=1, help="Count the tokens of the first so many texts.")
    ] = 1000,
    batch_size: BatchSize = 32,
    truncate: Truncate = False,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Show a model's layers, experts, parameters and routing, and where tokens go."""
    from moe_fast.cli.models import describe_model, load_converted
    from moe_fast.files import atomic_write, check_output
    from moe_fast.inference.models import load_model

    if output is not None and texts is None:
        raise typer.BadParameter("--output draws the tokens of texts: give --texts as well")
    for path in (output, json_output):
        if path is not None:
            check_output(path, overwrite)
    loaded = load_converted(model) if texts is None else load_model(model, device=device)
    shown = describe_model(loaded, model)
    print("\n".join(f"{name:22} {_shown(value)}" for name, value in shown.items()))
    if texts is not None:
        reading = {"columns": tuple(text_column), "domain_column": domain_column}
        names, usage = _usage(
            loaded, texts, reading, domain, max_texts, batch_size=batch_size, truncate=truncate
        )
        _print_usage(names, usage, loaded.transformers_model.config.moe_layers)
        shown |= {"usage_domains": names, "usage": usage.tolist()}
        if output is not None:
            from moe_fast.evaluation.plots import plot_expert_usage

            layers = loaded.transformers_model.config.moe_layers
            plot_expert_usage({Path(model).name: usage}, names, output, layers=layers)
            run.save_settings(output)
            run.say(f"{output}: tokens per expert")
    if json_output is not None:
        with atomic_write(json_output) as temporary:
            temporary.write_text(json.dumps(shown, indent=2), encoding="utf-8")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return printable(", ".join(map(str, value))) or "none"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def _usage(
    model: Any,
    path: Path,
    reading: dict[str, Any],
    domain: str | None,
    max_texts: int,
    *,
    batch_size: int,
    truncate: bool,
) -> tuple[list[str], NDArray]:
    """Names of the domains, and the shares [domain, layer, expert] of their tokens."""
    from itertools import islice

    from moe_fast.cli.models import in_model_order
    from moe_fast.evaluation import expert_usage
    from moe_fast.inference.texts import read_text_rows

    if not hasattr(model, "truncate"):
        raise ValueError("the model has no experts to count the tokens of; it is dense")
    rows = list(islice(read_text_rows(path, **reading), max_texts))
    if not rows:
        raise ValueError(f"{path}: no texts in this file")
    domains = [row.domain or domain for row in rows]
    named = [name for name in domains if name is not None]
    known = model.transformers_model.config.domains
    order = in_model_order(named or [_ALL], known)
    usage = expert_usage(
        model,
        [row.text for row in rows],
        named or [_ALL] * len(rows),
        order=order,
        pass_domain=bool(named and known),
        batch_size=batch_size,
        truncate=truncate,
        show_progress_bar=False,
    )
    return order, usage


def _print_usage(names: list[str], usage: NDArray, layers: list[int]) -> None:
    """A line per domain and layer: the share of the tokens that each expert got."""
    width = max(map(len, names))
    print("\ntokens per expert, in percent")
    for name, of_layers in zip(names, usage, strict=True):
        for layer, shares in zip(layers, of_layers, strict=True):
            print(
                f"  {name:{width}}  layer {layer:<3}" + "".join(f"{100 * s:7.1f}" for s in shares)
            )
