"""``moe-fast train``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    Columns,
    Delimiter,
    ModelArgument,
    Output,
    Overwrite,
    SkipInvalid,
    numbers,
    split_commas,
)
from moe_fast.cli.upcycle import (
    ALL_LAYERS,
    Domains,
    ExpertsPerToken,
    Layers,
    NumExperts,
    Routing,
    Target,
    WeightMode,
    parse_layers,
)

EXAMPLE = (
    "moe-fast train dense-model --data pairs.jsonl --routing enforced --max-steps 3 "
    "--batch-size 4 -o trained"
)
_DATA, _LOSS, _STEPS = "Data", "Loss", "Optimization"
_KEEP = "Checkpoints, evaluation, logs"


def _option(panel: str, text: str, *flags: str, **settings: Any) -> Any:
    return typer.Option(*flags, help=text, rich_help_panel=panel, **settings)


def run_command(
    model: ModelArgument,
    *,
    output: Output,
    data: Annotated[
        list[str],
        _option(_DATA, "File or dataset of pairs, triplets or FlagEmbedding rows; DOMAIN=FILE."),
    ],
    eval_data: Annotated[list[str] | None, _option(_DATA, "Likewise, to evaluate on.")] = None,
    columns: Columns = None,
    delimiter: Delimiter = None,
    skip_invalid: SkipInvalid = False,
    positives_only: Annotated[
        bool, _option(_DATA, "Leave out pairs with label 0.", "--positives-only")
    ] = False,
    allow_one_domain: Annotated[
        bool,
        _option(_DATA, "Train a mixture of several domains on one.", "--allow-one-domain"),
    ] = False,
    batches: Annotated[
        Literal["mixed", "single"] | None,
        _option(_DATA, "Batches that mix the domains (default), or of one domain each."),
    ] = None,
    swap: Annotated[bool, _option(_DATA, "Swap a and b in half of the epochs.", "--swap")] = False,
    hard_negatives: Annotated[
        int | None, _option(_DATA, "Drawn per FlagEmbedding row and epoch.", min=0)
    ] = None,
    max_length_query: Annotated[int | None, _option(_DATA, "Tokens of a query.", min=1)] = None,
    max_length_passage: Annotated[int | None, _option(_DATA, "Tokens of a passage.", min=1)] = None,
    query_prompt: Annotated[str | None, _option(_DATA, "Put before queries.")] = None,
    passage_prompt: Annotated[str | None, _option(_DATA, "Put before passages.")] = None,
    num_experts: NumExperts = None,
    num_experts_per_tok: ExpertsPerToken = 1,
    routing: Routing = None,
    weight_mode: WeightMode = "auto",
    layers: Layers = ALL_LAYERS,
    target: Target = "mlp",
    domains: Domains = None,
    trainable: Annotated[
        Literal["all", "experts", "experts+router"], _option(_STEPS, "What is trained.")
    ] = "all",
    freeze_embeddings: Annotated[
        bool, _option(_STEPS, "Do not train the token embeddings.", "--freeze-embeddings")
    ] = False,
    loss: Annotated[
        Literal["infonce", "mnr_plus", "clp", "sigmoid", "distillation"],
        _option(_LOSS, "What is minimised."),
    ] = "infonce",
    temperature: Annotated[float | None, _option(_LOSS, "By default the loss's own.")] = None,
    learn_temperature: Annotated[bool | None, _option(_LOSS, "By default the loss's own.")] = None,
    symmetric: Annotated[
        bool, _option(_LOSS, "Both directions (infonce, clp).", "--symmetric")
    ] = False,
    negatives_from: Annotated[
        Literal["all", "same_domain"], _option(_LOSS, "Where in-batch negatives come from.")
    ] = "all",
    matryoshka_dims: Annotated[
        list[str] | None, _option(_LOSS, "Lengths that must work too: 256,128.")
    ] = None,
    load_balance: Annotated[float, _option(_LOSS, "Coefficient.", min=0)] = 0.0,
    z_loss: Annotated[float, _option(_LOSS, "Coefficient.", min=0)] = 0.0,
    mutual_information: Annotated[float, _option(_LOSS, "Coefficient.", min=0)] = 0.0,
    expert_supervision: Annotated[float, _option(_LOSS, "Coefficient.", min=0)] = 0.0,
    joint_decay: Annotated[
        float | None,
        _option(_LOSS, "Average domain and expert over batches, in (0, 1)."),
    ] = None,
    batch_size: Annotated[int, _option(_STEPS, "Rows per step and process.", min=1)] = 32,
    tokens_per_chunk: Annotated[
        int | None,
        _option(
            _STEPS,
            "Encode a batch in chunks of so many tokens, in their memory; 0: measured and chosen.",
            min=0,
        ),
    ] = None,
    gradient_accumulation: Annotated[
        int, _option(_STEPS, "Batches per optimizer step.", min=1)
    ] = 1,
    epochs: Annotated[float, _option(_STEPS, "Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, _option(_STEPS, "Instead of epochs.", min=1)] = None,
    learning_rate: Annotated[float, _option(_STEPS, "At its highest.", min=0)] = 2e-5,
    temperature_learning_rate: Annotated[
        float, _option(_STEPS, "Of a learned temperature.", min=0)
    ] = 1e-3,
    warmup: Annotated[
        float, _option(_STEPS, "Share of the steps that the rate rises in.", min=0, max=1)
    ] = 0.1,
    weight_decay: Annotated[float, _option(_STEPS, "AdamW's.", min=0)] = 0.0,
    bf16: Annotated[bool, _option(_STEPS, "Compute in bfloat16.", "--bf16")] = False,
    save_steps: Annotated[
        int, _option(_KEEP, "Steps between checkpoints; 0 for none.", min=0)
    ] = 500,
    save_total_limit: Annotated[int, _option(_KEEP, "Checkpoints to keep.", min=1)] = 2,
    eval_steps: Annotated[
        int | None, _option(_KEEP, "Steps between evaluations; by default each epoch.", min=1)
    ] = None,
    early_stopping: Annotated[
        int | None,
        _option(_KEEP, "Stop after so many evaluations without a better loss.", min=1),
    ] = None,
    logging_steps: Annotated[int, _option(_KEEP, "Steps between logs.", min=1)] = 10,
    report_to: Annotated[
        Literal["none", "tensorboard"], _option(_KEEP, "Also log there.")
    ] = "none",
    resume: Annotated[
        bool, _option(_KEEP, "Go on from the last checkpoint of the output.", "--resume")
    ] = False,
    workers: Annotated[int, _option(_STEPS, "Processes that tokenize.", min=0)] = 0,
    device: Annotated[
        Literal["cpu"] | None, _option(_STEPS, "By default the GPU that PyTorch sees, if any.")
    ] = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Fine-tune a dense model or a mixture contrastively.

    With --num-experts, --domains or --routing a dense model becomes a mixture first. Several
    processes: torchrun --nproc-per-node 2 -m moe_fast.cli train ...
    """
    from moe_fast.cli.training import train_model

    parsed = {
        "layers": parse_layers(layers),
        "domains": split_commas(domains),
        "matryoshka_dims": numbers(matryoshka_dims, "--matryoshka-dims"),
    }
    train_model(SimpleNamespace(**{**run.settings, **parsed}), run)
