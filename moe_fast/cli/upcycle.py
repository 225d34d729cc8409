"""``moe-fast upcycle``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import ModelArgument, Output, Overwrite, numbers, split_commas

EXAMPLE = "moe-fast upcycle dense-model --num-experts 2 --domains law,medicine -o moe-model"


def _experts(text: str, **settings: Any) -> Any:
    return typer.Option(help=text, rich_help_panel="Experts", **settings)


NumExperts = Annotated[int | None, _experts("Number of experts; by default one per domain.", min=1)]
ExpertsPerToken = Annotated[
    int,
    _experts(
        "Number of experts that each token visits; each costs as much as the dense MLP.", min=1
    ),
]
Routing = Annotated[
    Literal["token_topk", "sentence_topk", "sentence_switch", "enforced", "dense"] | None,
    _experts(
        "How experts are chosen: by the text's domain (enforced), by a learned router for each "
        "token (token_topk) or each sentence, or all at once (dense); by default enforced with "
        "domains, else token_topk."
    ),
]
WeightMode = Annotated[
    Literal["auto", "renormalize", "probability", "straight_through", "one"],
    _experts(
        "Weights of the chosen experts: the router's share among the chosen (renormalize) or among "
        "all (probability), 1 with a gradient for the router (straight_through), or 1; auto is "
        "straight_through for one expert per token, renormalize for more."
    ),
]
Layers = Annotated[
    list[str],
    _experts(
        "Layers that get experts: all, single (the middle one), alternate (every other), or "
        "numbers, counted from 0, such as 0,2,4."
    ),
]
Target = Annotated[
    Literal["mlp", "intermediate", "output"],
    _experts("Part of the MLP that each expert copies: all, or one of its two projections."),
]
MoEBlock = Annotated[
    Literal["mlp", "multi_head"],
    _experts(
        "Block in the MLP's place: experts for whole tokens, or for parts of tokens, each routed "
        "apart (multi_head; the model then needs training before it is of use)."
    ),
]
MoEHeads = Annotated[
    int | None, _experts("Parts of a token in a multi-head block; by default 2.", min=1)
]
ExpertForm = Annotated[
    Literal["full", "lora"],
    _experts(
        "What an expert is: a full copy of the MLP, or a low-rank pair on one frozen MLP (lora)."
    ),
]
LoraRank = Annotated[int | None, _experts("Rank of LoRA experts; by default 8.", min=1)]
LoraAlpha = Annotated[
    float | None,
    _experts("LoRA's alpha: pairs count alpha / rank times; by default the rank.", min=0),
]
Domains = Annotated[
    list[str] | None,
    _experts("Names of the domains: law,medicine; with enforced routing the i-th has expert i."),
]
DomainTokens = Annotated[
    bool, _experts("Give each domain a token of its own, put in the place of [CLS].")
]
ALL_LAYERS = ["all"]


def run_command(
    model: ModelArgument,
    *,
    output: Output,
    head: Annotated[
        Literal["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"] | None,
        _experts(
            "Head of a model that sentence-transformers has not saved, to be kept; by default the "
            "encoder alone is read."
        ),
    ] = None,
    num_experts: NumExperts = None,
    num_experts_per_tok: ExpertsPerToken = 1,
    routing: Routing = None,
    weight_mode: WeightMode = "auto",
    layers: Layers = ALL_LAYERS,
    target: Target = "mlp",
    moe_block: MoEBlock = "mlp",
    moe_heads: MoEHeads = None,
    expert_form: ExpertForm = "full",
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    domains: Domains = None,
    default_domain: Annotated[
        str | None, _experts("Domain of texts given without one, by default an error.")
    ] = None,
    domain_tokens: DomainTokens = True,
    router_init: Annotated[
        Literal["normal", "kaiming_uniform"],
        _experts(
            "Distribution of the router's first weights: normal, as wide as the model's "
            "initializer_range, or Kaiming uniform."
        ),
    ] = "normal",
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Turn a dense encoder into a mixture of experts that gives the same embeddings.

    With --moe-block multi_head it gives others, and must be trained first.
    """
    from moe_fast.cli.models import describe_size, save_converted
    from moe_fast.encoding.model_paths import check_model_path
    from moe_fast.files import check_output

    names = split_commas(domains)
    if num_experts is None and not names:
        raise typer.BadParameter("give --num-experts, or --domains for one expert per domain")
    check_output(output, overwrite)
    check_model_path(model)
    mixture = make_mixture(
        model,
        SimpleNamespace(**{**run.settings, "layers": parse_layers(layers)}),
        names,
        head=head,
        default_domain=default_domain,
        domain_tokens=domain_tokens,
        router_init=router_init,
    )
    save_converted(mixture, output, model, run)
    run.say(f"{output}: {describe_size(mixture)}")


def make_mixture(model: Any, options: SimpleNamespace, names: list[str], **further: Any) -> Any:
    """Upcycle a model as the options say; with domains, the default routing is enforced."""
    import moe_fast

    return moe_fast.upcycle(
        model,
        num_experts=options.num_experts or len(names),
        num_experts_per_tok=options.num_experts_per_tok,
        routing=options.routing or ("enforced" if names else "token_topk"),
        weight_mode=options.weight_mode,
        layers=options.layers,
        target=options.target,
        moe_block=options.moe_block,
        moe_heads=options.moe_heads,
        expert_form=options.expert_form,
        lora_rank=options.lora_rank,
        lora_alpha=options.lora_alpha,
        domains=names or None,
        seed=options.seed,
        **further,
    )


def parse_layers(values: list[str]) -> str | list[int]:
    """Parse the values of ``--layers``: ``["all"]`` gives "all", ``["0,2"]`` gives [0, 2]."""
    if len(values) == 1 and values[0] in ("all", "single", "alternate"):
        return values[0]
    return numbers(values, "--layers", "all, single, alternate, or layer numbers such as 0,2,4")
