"""The pictures that ``moe-fast train`` leaves beside the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_fast.cli.models import in_model_order
from moe_fast.cli.training_data import domains_of, passages_of

_USAGE_TEXTS = 500


def draw(folder: Path, trainer: Any, texts: Any, options: SimpleNamespace) -> list[str]:
    """The curves and, of a mixture, the experts' usage; returns the files' names."""
    from moe_fast.evaluation.plots import plot_expert_usage, plot_training

    try:
        plot_training(trainer.state.log_history, folder / "training.png")
    except ImportError as error:
        return [f"no pictures ({error})"]
    encoder = trainer.model.transformers_model
    if not hasattr(encoder, "moe_mlps"):
        return ["training.png"]
    # spread over all rows: the first ones may be of one file, and so of one domain
    rows = texts.select(range(0, len(texts), -(-len(texts) // _USAGE_TEXTS)))
    names, usage = _usage(trainer.model, rows, options)
    plot_expert_usage(
        {"trained": usage}, names, folder / "expert_usage.png", layers=encoder.config.moe_layers
    )
    return ["training.png", "expert_usage.png"]


def _usage(model: Any, rows: Any, options: SimpleNamespace) -> tuple[list[str], Any]:
    """The domains, in the model's order, and where the tokens of their passages go."""
    from moe_fast.evaluation import expert_usage

    known = list(model.transformers_model.config.domains)
    found = domains_of(rows)
    names = in_model_order(found or ["all texts"], known)
    with _as_trained(model, options.max_length_passage):
        usage = expert_usage(
            model,
            passages_of(rows),
            list(rows["domain"]) if found else names * len(rows),
            order=names,
            pass_domain=bool(known and found),
            prompt=options.passage_prompt,
            truncate=True,
            show_progress_bar=False,
        )
    return names, usage


@contextmanager
def _as_trained(model: Any, max_length: int | None) -> Iterator[None]:
    """Texts are cut as in training, which has said so."""
    log = logging.getLogger("moe_fast")
    level, limit = log.level, model.max_seq_length
    log.setLevel(logging.ERROR)
    model.max_seq_length = max_length or limit
    try:
        yield
    finally:
        log.setLevel(level)
        model.max_seq_length = limit
