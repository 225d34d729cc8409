"""The application: every command, registered."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_fast.cli import (
    bench,
    cocite,
    demo,
    embed,
    evaluate,
    export,
    extract,
    inspect,
    join,
    mine,
    papers,
    quantize,
    search,
    serve,
    train,
    tune,
    upcycle,
)
from moe_fast.cli.command import add_command
from moe_fast.version import __version__

app = typer.Typer(
    help="Mixture-of-experts text encoders: make, train, measure and use them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

COMMANDS = {
    "upcycle": upcycle,
    "extract": extract,
    "join": join,
    "quantize": quantize,
    "export": export,
    "train": train,
    "evaluate": evaluate,
    "embed": embed,
    "search": search,
    "serve": serve,
    "inspect": inspect,
    "papers": papers,
    "cocite": cocite,
    "mine": mine,
    "tune": tune,
    "bench": bench,
    "demo": demo,
}
"""The module of each command, with its function ``run_command`` and its ``EXAMPLE``."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"moe-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


for _name, _module in COMMANDS.items():
    add_command(app, _name, _module.run_command, _module.EXAMPLE)
