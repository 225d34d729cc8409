"""``moe-fast join``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import Output, Overwrite, named_paths
from moe_fast.cli.upcycle import (
    ALL_LAYERS,
    DomainTokens,
    ExpertForm,
    ExpertsPerToken,
    Layers,
    Routing,
    Target,
    WeightMode,
    parse_layers,
)

EXAMPLE = "moe-fast join law=law-model medicine=medicine-model -o joined"


def run_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="DOMAIN=MODEL...",
            help="Dense models, one per domain: folders or hub ids; with --expert-form lora "
            "adapters of PEFT's.",
        ),
    ],
    *,
    output: Output,
    shared: Annotated[
        Literal["first", "mean"],
        typer.Option(
            help="Source of all weights except the experts': the first model, or the mean of all."
        ),
    ] = "first",
    routing: Routing = None,
    num_experts_per_tok: ExpertsPerToken = 1,
    weight_mode: WeightMode = "auto",
    layers: Layers = ALL_LAYERS,
    target: Target = "mlp",
    expert_form: ExpertForm = "full",
    domain_tokens: DomainTokens = True,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Join dense models or LoRA adapters, one per domain, into one mixture."""
    import moe_fast
    from moe_fast.cli.models import describe_size, save_converted
    from moe_fast.encoding.adapters import adapter_folder, base_of
    from moe_fast.encoding.model_paths import check_model_path
    from moe_fast.files import check_output

    named = named_paths(models, "DOMAIN=MODEL")
    if len(named) < 2:
        raise typer.BadParameter(f"join needs at least 2 models; got {len(named)}")
    check_output(output, overwrite)
    for path in named.values():
        check_model_path(path)
    settings: dict[str, Any] = dict(
        domains=list(named),
        routing=routing or "enforced",
        num_experts_per_tok=num_experts_per_tok,
        weight_mode=weight_mode,
        domain_tokens=domain_tokens,
        seed=run.seed,
    )
    first = next(iter(named.values()))
    if expert_form == "lora":
        if (shared, layers, target) != ("first", ALL_LAYERS, "mlp"):
            raise typer.BadParameter(
                "--shared, --layers and --target are not for --expert-form lora: the adapters and "
                "their base determine them"
            )
        mixture = moe_fast.from_adapters(list(named.values()), **settings)
        first = base_of(first, adapter_folder(first) or Path(first))
    else:
        mixture = moe_fast.from_experts(
            list(named.values()),
            shared=shared,
            layers=parse_layers(layers),
            target=target,
            **settings,
        )
    save_converted(mixture, output, first, run)
    run.say(f"{output}: {describe_size(mixture)}")
