"""What ``moe-fast train`` refuses: settings that do nothing or differ, models that are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_fast.cli.config import load_mapping, plain_settings

_OF_EXPERTS = {"num_experts_per_tok": 1, "weight_mode": "auto", "layers": "all", "target": "mlp"}
_BY_DOMAIN = ("mutual_information", "expert_supervision")
_MAY_CHANGE = {  # when a run is resumed: where and how long it runs, what it writes
    *("output", "overwrite", "resume", "device", "backend", "workers", "epochs", "max-steps"),
    *("save-steps", "save-total-limit", "eval-steps", "logging-steps", "report-to"),
}
_COMPARING = ("infonce", "clp", "mnr_plus")  # what they learn comes from negatives alone


def wants_experts(options: SimpleNamespace) -> bool:
    """Whether the options ask to make a mixture of a dense model."""
    return bool(options.num_experts or options.domains or options.routing)


def check_settings(options: SimpleNamespace) -> None:
    """Look at the options alone.

    Raises:
        ValueError: a number out of its range; an option that does nothing without another.
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
    """Look at the options beside the training data.

    Raises:
        ValueError: router terms that need domains, of data without; batches of one row without a
            negative, where every loss that compares is 0.
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


def check_dims(dims: list[int], size: int) -> None:
    """Raise ``ValueError`` where --matryoshka-dims go beyond the model's embeddings."""
    if max(dims) > size:
        raise ValueError(
            f"--matryoshka-dims must be at most the model's embedding size, {size}; got {max(dims)}"
        )


def check_weights(model: Any) -> None:
    """Raise ``RuntimeError`` where training has ended in NaN or infinity; nothing is saved then."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise RuntimeError(
                f"training has diverged: {name} holds NaN or infinity, and the model is not saved. "
                "Try a lower --learning-rate or a longer --warmup"
            )


def check_resumed(settings: Mapping[str, Any], saved: Path) -> None:
    """Refuse to go on with a run under settings that would make it another one.

    Args:
        settings: of this run.
        saved: the file of the interrupted run's.

    Raises:
        ValueError: a setting that differs and is none of those that may; the first is named.
    """
    before, now = load_mapping(saved), plain_settings(settings)
    fixed = (before.keys() | now.keys()) - _MAY_CHANGE
    if "early-stopping" in now:  # what is measured when decides when it stops
        fixed |= {"eval-steps"}
    for name in sorted(fixed):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--resume: --{name} was {before.get(name)!r} and is now {now.get(name)!r}; "
                f"go on with --config {saved}"
            )


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
