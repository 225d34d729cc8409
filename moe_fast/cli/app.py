"""The application: every command, registered."""

from __future__ import annotations

import typer

from moe_fast.cli import (
    bench,
    cocite,
    demo,
    embed,
    evaluate,
    extract,
    inspect,
    join,
    mine,
    search,
    train,
    tune,
    upcycle,
)
from moe_fast.cli.command import command

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
    "train": train,
    "evaluate": evaluate,
    "embed": embed,
    "search": search,
    "inspect": inspect,
    "cocite": cocite,
    "mine": mine,
    "tune": tune,
    "bench": bench,
    "demo": demo,
}
"""The module of each command, with its function ``run_command`` and its ``EXAMPLE``."""

for _name, _module in COMMANDS.items():
    command(app, _name, _module.EXAMPLE)(_module.run_command)
