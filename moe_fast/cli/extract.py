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
    as_adapter: Annotated[
        bool,
        typer.Option(
            "--as-adapter", help="Write a LoRA expert as an adapter of PEFT's, not a whole model."
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="For --as-adapter: the dense model that the mixture was made of, a folder or hub "
            "id; by default as the mixture names it."
        ),
    ] = None,
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
    """Make a dense model of one expert of a mixture, or an adapter of a LoRA expert."""
    import moe_fast
    from moe_fast.cli.models import describe_size, save_converted
    from moe_fast.encoding.loading import load_as_saved
    from moe_fast.files import atomic_folder, check_output

    if base is not None and not as_adapter:
        raise typer.BadParameter("--base is for --as-adapter")
    if as_adapter and keep_domain_tokens:
        raise typer.BadParameter("--keep-domain-tokens is not for --as-adapter, which has none")
    check_output(output, overwrite)
    mixture = load_as_saved(model)
    config = getattr(mixture, "transformers_model", mixture).config
    is_number = expert.isdigit() and expert not in getattr(config, "domains", ())
    chosen = int(expert) if is_number else expert
    if as_adapter:
        with atomic_folder(output, replaces=("*",)) as temporary:
            moe_fast.write_adapter(mixture, chosen, temporary, base=base)
            run.save_settings(temporary)
        run.say(f"{output}: an adapter of rank {config.lora_rank}")
        return
    dense = moe_fast.extract_expert(mixture, chosen, keep_domain_tokens=keep_domain_tokens)
    save_converted(dense, output, model, run)
    run.say(f"{output}: {describe_size(dense)}")
