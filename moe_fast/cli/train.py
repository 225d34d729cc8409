"""``moe-fast train``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Annotated, Literal

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    Columns,
    Delimiter,
    ModelArgument,
    Output,
    Overwrite,
    SkipInvalid,
    numbers,
    option,
    split_commas,
)
from moe_fast.cli.upcycle import (
    ALL_LAYERS,
    Domains,
    ExpertForm,
    ExpertsPerToken,
    Layers,
    LoraAlpha,
    LoraRank,
    MoEBlock,
    MoEHeads,
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
_DATA, _MODEL, _LOSS, _STEPS = "Data", "Model", "Loss", "Optimization"
_KEEP = "Checkpoints, evaluation, logs"


def run_command(
    model: ModelArgument,
    *,
    output: Output,
    data: Annotated[
        list[str],
        option(_DATA, "File or dataset of pairs, triplets or FlagEmbedding rows; DOMAIN=FILE."),
    ],
    eval_data: Annotated[
        list[str] | None, option(_DATA, "Files or datasets as for --data, to evaluate on.")
    ] = None,
    columns: Columns = None,
    delimiter: Delimiter = None,
    skip_invalid: SkipInvalid = False,
    positives_only: Annotated[
        bool, option(_DATA, "Leave out pairs with label 0.", "--positives-only")
    ] = False,
    allow_one_domain: Annotated[
        bool,
        option(
            _DATA,
            "Allow training data of one domain only for a mixture with several domains.",
            "--allow-one-domain",
        ),
    ] = False,
    batches: Annotated[
        Literal["mixed", "single"] | None,
        option(_DATA, "Batches that mix the domains evenly (default), or of one domain each."),
    ] = None,
    swap: Annotated[
        bool, option(_DATA, "Take each pair (a, b) as (b, a) in half of the epochs.", "--swap")
    ] = False,
    hard_negatives: Annotated[
        int | None,
        option(
            _DATA,
            "Number of negatives to draw from each FlagEmbedding row in each epoch; by default 1.",
            min=0,
        ),
    ] = None,
    max_length_query: Annotated[
        int | None,
        option(_DATA, "Cut queries after this many tokens; by default the model's limit.", min=1),
    ] = None,
    max_length_passage: Annotated[
        int | None,
        option(_DATA, "Cut passages after this many tokens; by default the model's limit.", min=1),
    ] = None,
    query_prompt: Annotated[
        str | None, option(_DATA, "Text put before every query; saved with the model.")
    ] = None,
    passage_prompt: Annotated[
        str | None, option(_DATA, "Text put before every passage; saved with the model.")
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
    pooling: Annotated[
        Literal["cls", "mean", "last"] | None,
        option(
            _MODEL,
            "Vector of a text: that of its first token (cls), the mean over its tokens, or that of "
            "its last token; by default as the model has it. Saved with the model.",
        ),
    ] = None,
    trainable: Annotated[
        Literal["all", "experts", "experts+router"] | None,
        option(
            _STEPS,
            "Weights that are trained; the others stay as they are. By default all, or LoRA "
            "experts and the router.",
        ),
    ] = None,
    freeze_embeddings: Annotated[
        bool, option(_STEPS, "Do not train the token embeddings.", "--freeze-embeddings")
    ] = False,
    loss: Annotated[
        Literal["infonce", "mnr_plus", "clp", "sigmoid", "distillation", "listwise_distillation"],
        option(_LOSS, "Loss that is minimised."),
    ] = "infonce",
    temperature: Annotated[
        float | None,
        option(
            _LOSS,
            "Temperature that similarities are divided by; by default that of the loss, .05 for "
            "infonce.",
        ),
    ] = None,
    learn_temperature: Annotated[
        bool | None, option(_LOSS, "Train the temperature, too; by default sigmoid does.")
    ] = None,
    symmetric: Annotated[
        bool,
        option(
            _LOSS,
            "Compute the loss in both directions, also from passage to query (infonce, clp).",
            "--symmetric",
        ),
    ] = False,
    negatives_from: Annotated[
        Literal["all", "same_domain"],
        option(_LOSS, "Rows of the batch that give negatives: all, or those of the same domain."),
    ] = "all",
    gather: Annotated[
        bool,
        option(
            _LOSS,
            "With several processes, take the rows of all of them as negatives (infonce, clp).",
            "--gather",
        ),
    ] = False,
    matryoshka_dims: Annotated[
        list[str] | None,
        option(_LOSS, "Train shorter embeddings, too: the first 256 and 128 numbers for 256,128."),
    ] = None,
    load_balance: Annotated[
        float,
        option(
            _LOSS,
            "Weight of the term that evens out the experts, such as .05 with --router-reduction "
            "mean; summed, .05 divided by the number of MoE layers. 0: none.",
            min=0,
        ),
    ] = 0.0,
    z_loss: Annotated[
        float,
        option(_LOSS, "Weight of the term that keeps router logits small, such as .001.", min=0),
    ] = 0.0,
    mutual_information: Annotated[
        float,
        option(
            _LOSS,
            "Weight of the mutual information between domains and experts, such as .1; it makes "
            "experts specialise.",
            min=0,
        ),
    ] = 0.0,
    expert_supervision: Annotated[
        float,
        option(_LOSS, "Weight of the term that assigns expert i to domain i, such as .1.", min=0),
    ] = 0.0,
    router_reduction: Annotated[
        Literal["sum", "mean"],
        option(_LOSS, "Router terms over the MoE layers: their sum, or their mean."),
    ] = "sum",
    joint_decay: Annotated[
        float | None,
        option(
            _LOSS,
            "For --mutual-information: weight of earlier batches in a running average, in (0, 1).",
        ),
    ] = None,
    pool_experts: Annotated[
        float | None,
        option(
            _LOSS,
            "With a domain per expert: let experts learn from other domains' texts, too; this "
            "number, such as 300, over itself plus the rows of its domain is the share of each.",
            min=0,
        ),
    ] = None,
    batch_size: Annotated[int, option(_STEPS, "Rows per step and process.", min=1)] = 32,
    tokens_per_chunk: Annotated[
        int | None,
        option(
            _STEPS,
            "Encode a batch in chunks of this many tokens, to save memory; 0: choose the number by "
            "measuring.",
            min=0,
        ),
    ] = None,
    gradient_accumulation: Annotated[int, option(_STEPS, "Batches per optimizer step.", min=1)] = 1,
    epochs: Annotated[float, option(_STEPS, "Passes over the data, such as 0.5 or 3.")] = 1.0,
    max_steps: Annotated[
        int | None, option(_STEPS, "Optimizer steps to train for, instead of --epochs.", min=1)
    ] = None,
    learning_rate: Annotated[
        float, option(_STEPS, "Learning rate of AdamW, at its highest.", min=0)
    ] = 2e-5,
    temperature_learning_rate: Annotated[
        float, option(_STEPS, "Learning rate of a learned temperature.", min=0)
    ] = 1e-3,
    warmup: Annotated[
        float,
        option(
            _STEPS, "Share of the steps in which the learning rate rises, 0 to 1.", min=0, max=1
        ),
    ] = 0.1,
    weight_decay: Annotated[float, option(_STEPS, "Weight decay of AdamW.", min=0)] = 0.0,
    bf16: Annotated[
        bool, option(_STEPS, "Compute in bfloat16 (autocast); weights stay float32.", "--bf16")
    ] = False,
    save_steps: Annotated[
        int, option(_KEEP, "Steps between checkpoints; 0 for none.", min=0)
    ] = 500,
    save_total_limit: Annotated[int, option(_KEEP, "Checkpoints to keep, the newest.", min=1)] = 2,
    eval_steps: Annotated[
        int | None,
        option(_KEEP, "Steps between evaluations; by default one after each epoch.", min=1),
    ] = None,
    early_stopping: Annotated[
        int | None,
        option(_KEEP, "Stop after this many evaluations without a better loss.", min=1),
    ] = None,
    logging_steps: Annotated[int, option(_KEEP, "Steps between logs.", min=1)] = 10,
    report_to: Annotated[
        Literal["none", "tensorboard"], option(_KEEP, "Write the logs there, too.")
    ] = "none",
    resume: Annotated[
        bool,
        option(
            _KEEP,
            "Continue the interrupted run in the output folder from its last checkpoint.",
            "--resume",
        ),
    ] = False,
    workers: Annotated[
        int,
        option(
            _STEPS,
            "Processes that read and tokenize during training; 0: the training process does so.",
            min=0,
        ),
    ] = 0,
    device: Annotated[
        Literal["cpu"] | None,
        option(_STEPS, "Device; by default the GPU that PyTorch sees, if any."),
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
