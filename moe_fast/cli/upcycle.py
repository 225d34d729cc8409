"""``moe-fast upcycle``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import ModelArgument, Output, Overwrite, split_commas

EXAMPLE = "moe-fast upcycle dense-model --num-experts 2 --domains law,medicine -o moe-model"


def _experts(text: str, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Experts", **settings)


NumExperts = Annotated[int | None, _experts("Experts; by default one per domain.", min=1)]
ExpertsPerToken = Annotated[int, _experts("Experts that each token visits.", min=1)]
Routing = Annotated[
    Literal["token_topk", "sentence_topk", "sentence_switch", "enforced", "dense"] | None,
    _experts("How experts are chosen; by default enforced with domains, else token_topk."),
]
WeightMode = Annotated[
    Literal["auto", "renormalize", "probability", "straight_through", "one"],
    _experts("Weights of the chosen experts."),
]
Layers = Annotated[list[str], _experts("all, single, alternate, or layer numbers such as 0,2,4.")]
Target = Annotated[Literal["mlp", "intermediate", "output"], _experts("What is replicated.")]
Domains = Annotated[list[str] | None, _experts("Names of the domains: law,medicine.")]
DomainTokens = Annotated[bool, _experts("Give each domain a token in [CLS]'s place.")]
ALL_LAYERS = ["all"]


def run_command(
    model: ModelArgument,
    *,
    output: Output,
    num_experts: NumExperts = None,
    num_experts_per_tok: ExpertsPerToken = 1,
    routing: Routing = None,
    weight_mode: WeightMode = "auto",
    layers: Layers = ALL_LAYERS,
    target: Target = "mlp",
    domains: Domains = None,
    default_domain: Annotated[str | None, _experts("Of texts that name none.")] = None,
    domain_tokens: DomainTokens = True,
    router_init: Annotated[
        Literal["normal", "kaiming_uniform"], _experts("Initialisation of the router.")
    ] = "normal",
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Turn a dense encoder into a mixture of experts that gives the same embeddings."""
    import moe_fast
    from moe_fast.cli.models import describe_size, save_converted
    from moe_fast.files import check_output
    from moe_fast.inference.models import check_model_path

    names = split_commas(domains)
    if num_experts is None and not names:
        raise typer.BadParameter("give --num-experts, or --domains for one expert per domain")
    check_output(output, overwrite)
    check_model_path(model)
    mixture = moe_fast.upcycle(
        model,
        num_experts=num_experts or len(names),
        num_experts_per_tok=num_experts_per_tok,
        routing=routing or ("enforced" if names else "token_topk"),
        weight_mode=weight_mode,
        layers=parse_layers(layers),
        target=target,
        domains=names or None,
        default_domain=default_domain,
        domain_tokens=domain_tokens,
        router_init=router_init,
        seed=run.seed,
    )
    save_converted(mixture, output, model, run)
    run.say(f"{output}: {describe_size(mixture)}")


def parse_layers(values: list[str]) -> str | list[int]:
    """``["all"]`` as "all", ``["0,2"]`` as [0, 2]."""
    if len(values) == 1 and values[0] in ("all", "single", "alternate"):
        return values[0]
    parts = split_commas(values)
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(
            "--layers must be all, single, alternate, or layer numbers such as 0,2,4; got "
            + ", ".join(parts)
        )
    return [int(part) for part in parts]
