"""Checks the settings, the data and the trained weights of ``moe-fast train``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_fast.cli.config import load_mapping, plain_settings

_OF_EXPERTS = {
    **{"num_experts_per_tok": 1, "weight_mode": "auto", "layers": "all", "target": "mlp"},
    **{"moe_block": "mlp", "moe_heads": None},
    **{"expert_form": "full", "lora_rank": None, "lora_alpha": None},
}
_BY_DOMAIN = ("mutual_information", "expert_supervision")
_MAY_CHANGE = {  # settings that may change when a run is resumed
    *("output", "overwrite", "resume", "device", "backend", "workers", "epochs", "max-steps"),
    *("save-steps", "save-total-limit", "eval-steps", "logging-steps", "report-to"),
}
FEW_ROWS = 100
"""An expert that is trained on fewer rows loses to a dense model (experiments/results)."""
_COMPARING = ("infonce", "clp", "mnr_plus")  # losses that are 0 without negatives


def wants_experts(options: SimpleNamespace) -> bool:
    """Return whether the options ask to make a mixture of a dense model."""
    return bool(options.num_experts or options.domains or options.routing)


def check_settings(options: SimpleNamespace) -> None:
    """Check the options without the data.

    Raises:
        ValueError: a number is out of range, or an option has no effect without another.
    """
    if options.epochs <= 0:
        raise ValueError(f"--epochs must be above 0; got {options.epochs:g}")
    if not wants_experts(options):
        given = [name for name, default in _OF_EXPERTS.items() if getattr(options, name) != default]
        if given:
            raise ValueError(
                f"{_flags(given)} shape the mixture made of a dense model: give --num-experts, "
                "--domains or --routing as well"
            )
    if options.joint_decay is not None and not options.mutual_information:
        raise ValueError("--joint-decay is for --mutual-information, whose coefficient is 0")


def check_batches(options: SimpleNamespace, rows: Any) -> None:
    """Check the options together with the training data.

    Raises:
        ValueError: router terms need domains, and the data have none.
        ValueError: the loss takes its negatives from the batch, and batches have one row.
    """
    needed = [name for name in _BY_DOMAIN if getattr(options, name) > 0]
    if needed and "domain" not in rows.column_names:
        raise ValueError(
            f"{_flags(needed)} need data with domains: a column 'domain', or --data DOMAIN=FILE"
        )
    hard = {"negative_1", "neg"} & set(rows.column_names) and options.hard_negatives != 0
    if options.loss not in _COMPARING or hard:
        return
    if min(options.batch_size, len(rows)) < 2:
        raise ValueError(
            f"--loss {options.loss} takes its negatives from the batch, which must have at least 2 "
            f"rows; got --batch-size {options.batch_size} and {len(rows)} rows of data"
        )


def check_pooled(rows: Mapping[str, int]) -> None:
    """Raise ``ValueError`` if --pool-experts has nothing to pool, {domain: rows}."""
    if not rows:
        raise ValueError(
            "--pool-experts needs a mixture with an expert per domain (--routing enforced) and "
            "data with domains: a column 'domain', or --data DOMAIN=FILE"
        )


def warn_of_few_rows(rows: Mapping[str, int]) -> str:
    """Return what to say of domains whose experts have few rows, {domain: rows}."""
    counts = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    return (
        f"warning: experts with fewer than {FEW_ROWS} rows of training data: {counts}. Such an "
        "expert tends to be worse than a dense model; --pool-experts 300 lets it learn from the "
        "other domains, too"
    )


def check_dims(dims: list[int], size: int) -> None:
    """Raise ``ValueError`` if --matryoshka-dims are larger than the model's embedding size."""
    if max(dims) > size:
        raise ValueError(
            f"--matryoshka-dims must be at most the model's embedding size, {size}; got {max(dims)}"
        )


def check_weights(model: Any) -> None:
    """Raise ``RuntimeError``, before the model is saved, if a weight is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RuntimeError(
                f"training has diverged: {name} holds NaN or infinity, and the model is not saved. "
                "Try a lower --learning-rate or a longer --warmup"
            )


def check_resumed(settings: Mapping[str, Any], saved: Path) -> None:
    """Raise an error if a run is resumed with settings that would change its result.

    Args:
        settings: the settings of this run.
        saved: the file with the settings of the interrupted run.

    Raises:
        ValueError: a setting differs that may not; the error names the first.
    """
    before, now = load_mapping(saved), plain_settings(settings)
    fixed = (before.keys() | now.keys()) - _MAY_CHANGE
    if "early-stopping" in now:  # when it is evaluated determines when it stops
        fixed |= {"eval-steps"}
    for name in sorted(fixed):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--resume: --{name} was {before.get(name)!r} and is now {now.get(name)!r}; "
                f"go on with --config {saved}"
            )


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
