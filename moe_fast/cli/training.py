"""Runs ``moe-fast train``: reads the data, makes the model, trains it and saves the results.

``options`` is the namespace of the command's parameters, see :mod:`moe_fast.cli.train`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import typer

from moe_fast.cli import training_runs as runs
from moe_fast.cli.command import Run, is_first_process
from moe_fast.cli.models import describe_size
from moe_fast.cli.options import check_delimiter
from moe_fast.cli.training_checks import (
    FEW_ROWS,
    check_batches,
    check_dims,
    check_pooled,
    check_resumed,
    check_settings,
    check_weights,
    wants_experts,
    warn_of_few_rows,
)
from moe_fast.cli.training_data import (
    check_domains,
    columns_of,
    domains_of,
    for_loss,
    read_data,
    reading_of,
    rows_per_expert,
)
from moe_fast.cli.training_pictures import draw
from moe_fast.cli.upcycle import make_mixture
from moe_fast.files import atomic_folder
from moe_fast.training.locks import hold_folder

_INTERRUPTED = 130  # a shell's exit code for a program that Ctrl-C has ended


def train_model(options: SimpleNamespace, run: Run) -> None:
    """Train a model as the options say, and save it.

    Raises:
        typer.Exit: the run was interrupted by Ctrl-C.
    """
    check_settings(options)
    checkpoints = Path(options.output) / runs.CHECKPOINTS
    interruption = runs.Interruption()
    try:
        _train(options, run, checkpoints, interruption)
    except KeyboardInterrupt:
        if is_first_process():
            print(f"moe-fast train: {interruption.message(checkpoints)}", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None


def _train(
    options: SimpleNamespace, run: Run, checkpoints: Path, interruption: runs.Interruption
) -> None:
    if is_first_process() and checkpoints.is_dir():
        run.held.enter_context(hold_folder(checkpoints))
    last = _start_of(options, run, checkpoints)
    train, evaluation = _read(options, run)
    check_batches(options, train)
    model = prepare_model(options, run, domains_of(train))
    check_domains(model, train, options.allow_one_domain)
    trainer = build_trainer(options, run, model, train, evaluation, checkpoints)
    trainer.add_callback(interruption)
    if is_first_process():
        inputs = runs.describe_inputs(options.model, train, evaluation)
        run.held.enter_context(hold_folder(checkpoints))
        _start_of(options, run, checkpoints)  # check again: another run may have begun meanwhile
        if last is not None:
            runs.check_same_inputs(checkpoints, inputs)
        else:
            runs.forget_checkpoints(checkpoints)
            run.save_settings(checkpoints)  # needed to resume the run if it is interrupted
            runs.save_inputs(checkpoints, inputs)
    run.say(f"{describe_size(model)}; {len(train):,} training rows")
    try:
        with interruption.listening(run.quiet):
            result = trainer.train(resume_from_checkpoint=last)
    except ValueError:
        check_weights(model)  # if embeddings were NaN, this error names the cause
        raise
    check_weights(trainer.model)
    if trainer.is_world_process_zero():
        save_results(options, trainer, dict(result.metrics), evaluation or train, run)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _start_of(options: SimpleNamespace, run: Run, checkpoints: Path) -> str | None:
    """Return the checkpoint to resume from; None to start from the beginning.

    It is also None for a run that was interrupted before its first checkpoint.

    Raises:
        FileExistsError: a new run may not write to the output.
        FileNotFoundError: there is no run to resume.
        ValueError: the settings differ from those of the run to resume.
    """
    if not options.resume:
        if is_first_process():
            runs.check_free(checkpoints.parent, options.overwrite)
        return None
    if not (checkpoints / runs.SETTINGS).is_file():
        raise FileNotFoundError(
            f"--resume: there is no checkpoint of moe-fast train in {checkpoints}"
        )
    check_resumed(run.settings, checkpoints / runs.SETTINGS)
    return runs.last_checkpoint(checkpoints)


def _read(options: SimpleNamespace, run: Run) -> tuple[Any, Any]:
    """Read the rows to train on and the rows to evaluate on, which may be None."""
    check_delimiter(options.delimiter, [*options.data, *(options.eval_data or ())])
    reading = reading_of(options)
    train, evaluation = (
        for_loss(read_data(sources, options.positives_only, **reading), options.loss, run)
        if sources
        else None
        for sources in (options.data, options.eval_data)
    )
    return train, evaluation


def prepare_model(options: SimpleNamespace, run: Run, data_domains: list[str]) -> Any:
    """Load the model in float32, make it a mixture and freeze a part of it as the options say.

    Raises:
        ValueError: the options ask for experts, and the model is a mixture already.
        ValueError: the number of experts is not known.
        ValueError: a part of a dense model is to be frozen.
        TypeError, ValueError: the pooling cannot be set.
    """
    from moe_fast.conversion import set_trainable
    from moe_fast.encoding.pooling import set_pooling
    from moe_fast.inference import load_model
    from moe_fast.models.lora import has_lora
    from moe_fast.training.trainable import precisions

    model = load_model(options.model, device="cpu")  # the trainer moves it
    if half := precisions(model.parameters()):
        run.say(
            f"{options.model} is saved in {', '.join(half)}, in which most updates would be "
            "rounded away: its weights are float32 for training, and in the result"
        )
        model.float()
    if options.pooling is not None:
        set_pooling(model, options.pooling)
    wanted = wants_experts(options)
    is_mixture = hasattr(model.transformers_model, "moe_mlps")
    if wanted and is_mixture:
        raise ValueError(
            "--num-experts, --domains and --routing make a mixture of a dense model; "
            f"{options.model} is one already"
        )
    if wanted:
        names = options.domains or (data_domains if options.routing in (None, "enforced") else [])
        if not (options.num_experts or names):
            raise ValueError("give --num-experts: neither --domains nor the data say how many")
        model = make_mixture(model, options, names)
    freezes = options.trainable not in (None, "all") or options.freeze_embeddings
    if freezes and not (wanted or is_mixture):
        raise ValueError("--trainable and --freeze-embeddings are for mixtures; the model is dense")
    encoder = model.transformers_model
    freezes_itself = has_lora(encoder) and options.trainable is None
    if (
        (freezes or options.trainable == "all")
        and hasattr(encoder, "moe_mlps")
        and not freezes_itself
    ):
        set_trainable(
            encoder, options.trainable or "all", freeze_embeddings=options.freeze_embeddings
        )
    prompts = {"query": options.query_prompt, "document": options.passage_prompt}
    model.prompts.update({name: text for name, text in prompts.items() if text is not None})
    return model


def build_loss(
    options: SimpleNamespace, model: Any, column_names: list[str], data_domains: list[str]
) -> Any:
    """Make the loss, and wrap it in the Matryoshka, router and cached losses asked for.

    Args:
        options: the command's parameters.
        model: the model to train.
        column_names: the columns of the training data.
        data_domains: the names of the domains in the data, which the model may not know.

    Raises:
        ValueError: the loss does not have a setting, or its value is out of range.
    """
    from moe_fast import losses

    classes = {
        "infonce": losses.InfoNCELoss,
        "mnr_plus": losses.MultipleNegativesRankingPlusLoss,
        "clp": losses.ContrastiveLearningPenaltyLoss,
        "sigmoid": losses.SigmoidLoss,
        "distillation": losses.DistillationLoss,
        "listwise_distillation": losses.ListwiseDistillationLoss,
    }
    given = {name: getattr(options, name) for name in ("temperature", "learn_temperature")}
    settings = {name: value for name, value in given.items() if value is not None}
    for name, default, known in (
        ("symmetric", False, ("infonce", "clp")),
        ("negatives_from", "all", ("infonce", "clp", "sigmoid", "listwise_distillation")),
        ("gather", False, ("infonce", "clp")),
    ):
        value = getattr(options, name)
        if value != default and options.loss not in known:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for --loss {', '.join(known)}; got {options.loss}")
        if options.loss in known:
            settings["gather_across_devices" if name == "gather" else name] = value
    if options.loss == "clp":
        settings["queries_per_negative"] = int("neg_q" in column_names)
    loss = classes[options.loss](model, **settings)
    if options.matryoshka_dims:
        check_dims(options.matryoshka_dims, model.get_embedding_dimension())
        loss = losses.MatryoshkaLoss(loss, options.matryoshka_dims)
    loss = _with_router_terms(options, loss, data_domains)
    if options.tokens_per_chunk is None:
        return loss
    return losses.CachedLoss(loss, tokens_per_chunk=options.tokens_per_chunk or None)


def _with_router_terms(options: SimpleNamespace, loss: Any, data_domains: list[str]) -> Any:
    """Add the router terms with a weight above 0 to the loss, if there are any."""
    from moe_fast.losses import RouterLoss

    terms = ("load_balance", "z_loss", "mutual_information", "expert_supervision")
    coefficients = {name: getattr(options, name) for name in terms}
    if not any(coefficients.values()):
        return loss
    # domain ids are indices into the model's domains or, if it has none, into those of the data
    named = getattr(loss.model.transformers_model.config, "domains", ())
    num_domains = None if named else len(data_domains) or None
    return RouterLoss(
        loss,
        reduction=options.router_reduction,
        joint_decay=options.joint_decay,
        num_domains=num_domains,
        **coefficients,
    )


def build_arguments(
    options: SimpleNamespace, run: Run, loss: Any, column_names: list[str], checkpoints: Path
) -> Any:
    """Make the trainer's arguments.

    Raises:
        ValueError: an option needs domains or evaluation data, and there are none.
    """
    from sentence_transformers.sentence_transformer.training_args import (
        SentenceTransformerTrainingArguments,
    )

    from moe_fast.training import DomainBatchSampler

    arguments: dict[str, Any] = {}
    if "domain" in column_names:
        arguments["batch_sampler"] = partial(DomainBatchSampler, mode=options.batches or "mixed")
    elif options.batches is not None:
        raise ValueError("--batches needs data with domains; the data have none")
    if any(name.endswith("log_temperature") for name, _ in loss.named_parameters()):
        rates = {"log_temperature": options.temperature_learning_rate}
        arguments["learning_rate_mapping"] = rates
    prompts = _by_column(column_names, options.query_prompt, options.passage_prompt)
    return SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        bf16=options.bf16,
        logging_steps=options.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN loss must be visible in the logs
        save_total_limit=options.save_total_limit,
        report_to=[] if options.report_to == "none" else [options.report_to],
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device != "cpu" and torch.cuda.is_available(),
        dataloader_num_workers=options.workers,
        disable_tqdm=run.quiet,
        seed=options.seed,
        prompts=prompts or None,
        **arguments,
        **_schedule(options),
    )


def _schedule(options: SimpleNamespace) -> dict[str, Any]:
    """Return the arguments that say when to evaluate and when to save."""
    if options.early_stopping is not None and not options.eval_data:
        raise ValueError("--early-stopping needs --eval-data")
    if options.eval_steps is not None and not options.eval_data:
        raise ValueError("--eval-steps needs --eval-data")
    when = "steps" if options.eval_steps else "epoch"
    evaluating = {"eval_strategy": when, "eval_steps": options.eval_steps}
    if not options.eval_data:
        evaluating = {"eval_strategy": "no"}
    if options.early_stopping is not None:  # the best model is restored: save at each evaluation
        return evaluating | {
            "save_strategy": when,
            "save_steps": options.eval_steps or 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "restore_callback_states_from_checkpoint": True,  # evaluations without a better loss
        }
    saving = "steps" if options.save_steps else "no"
    return evaluating | {"save_strategy": saving, "save_steps": options.save_steps or 1}


def build_trainer(
    options: SimpleNamespace, run: Run, model: Any, train: Any, evaluation: Any, checkpoints: Path
) -> Any:
    """Make the loss, the arguments and the trainer, which checks them against the data."""
    from transformers import EarlyStoppingCallback, PrinterCallback

    from moe_fast.training import (
        ExpertPoolingCallback,
        ExpertUsageCallback,
        MoESentenceTransformerTrainer,
    )

    names = list(train.column_names)
    callbacks: list[Any] = []
    if hasattr(model.transformers_model, "moe_mlps"):
        callbacks.append(ExpertUsageCallback(log_shares=False))
    rows = rows_per_expert(model, train)
    if options.pool_experts is not None:
        check_pooled(rows)
        callbacks.append(ExpertPoolingCallback(rows, options.pool_experts))
    elif few := {name: count for name, count in rows.items() if count < FEW_ROWS}:
        run.say(warn_of_few_rows(few))
    if options.early_stopping is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=options.early_stopping))
    both = {name for rows in (train, evaluation) if rows is not None for name in domains_of(rows)}
    loss = build_loss(options, model, names, sorted(both))
    lengths = _by_column(names, options.max_length_query, options.max_length_passage)
    trainer = MoESentenceTransformerTrainer(
        model=model,
        args=build_arguments(options, run, loss, names, checkpoints),
        train_dataset=train,
        eval_dataset=evaluation,
        loss=loss,
        callbacks=callbacks,
        swap_pairs=options.swap,
        num_negatives=options.hard_negatives,
        max_length=lengths or None,
    )
    if run.quiet:
        trainer.remove_callback(PrinterCallback)
    return trainer


def _by_column(column_names: list[str], query: Any, passage: Any) -> dict[str, Any]:
    """Return {text column: setting}; columns whose setting is None are left out."""
    queries, passages = columns_of(column_names)
    settings = {**dict.fromkeys(queries, query), **dict.fromkeys(passages, passage)}
    return {column: value for column, value in settings.items() if value is not None}


def save_results(
    options: SimpleNamespace, trainer: Any, metrics: dict[str, Any], texts: Any, run: Run
) -> None:
    """Save the model, the settings and the log in one step, then the pictures.

    The checkpoints are kept.
    """
    from moe_fast.training import ExpertUsageCallback
    from moe_fast.training.loss_state import save_loss_state

    output = Path(options.output)
    callbacks = trainer.callback_handler.callbacks
    usage = next((c for c in callbacks if isinstance(c, ExpertUsageCallback)), None)
    log = {
        "metrics": metrics,
        "history": trainer.state.log_history,
        "steps": trainer.state.global_step,
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "processes": trainer.args.world_size,
        "tokens_per_expert": usage.total_tokens() if usage is not None else None,
    }
    with atomic_folder(output, replaces=runs.replaced_results(output)) as temporary:
        trainer.model.save_pretrained(str(temporary))
        save_loss_state(trainer.loss, str(temporary))
        run.save_settings(temporary)
        files = [path for path in temporary.rglob("*") if path.is_file()]
        log["files"] = [runs.LOG, *sorted(path.relative_to(temporary).as_posix() for path in files)]
        (temporary / runs.LOG).write_text(json.dumps(log, indent=2), encoding="utf-8")
    drawn = draw(output, trainer, texts, options)
    run.say(f"{output}: the model, train.yaml, training_log.json{', '.join(['', *drawn])}")
