"""``moe-fast extract``."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import ModelArgument, Output, Overwrite

EXAMPLE = "moe-fast extract mixture --expert law -o law-alone"


def run_command(
    model: ModelArgument,
    *,
    expert: Annotated[
        str,
        typer.Option(
            help="The expert to extract: its domain's name, or its number, counted from 0."
        ),
    ],
    output: Output,
    keep_domain_tokens: Annotated[
        bool,
        typer.Option(
            "--keep-domain-tokens",
            help="Keep the domains' tokens in the tokenizer; by default they are removed.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Make a dense model of one expert of a mixture."""
    import moe_fast
    from moe_fast.cli.models import describe_size, load_converted, save_converted
    from moe_fast.files import check_output

    check_output(output, overwrite)
    mixture = load_converted(model)
    config = getattr(mixture, "transformers_model", mixture).config
    is_number = expert.isdigit() and expert not in getattr(config, "domains", ())
    dense = moe_fast.extract_expert(
        mixture, int(expert) if is_number else expert, keep_domain_tokens=keep_domain_tokens
    )
    save_converted(dense, output, model, run)
    run.say(f"{output}: {describe_size(dense)}")
