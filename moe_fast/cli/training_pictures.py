"""Draws the pictures that ``moe-fast train`` saves with the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_fast.cli.models import usage_by_domain
from moe_fast.cli.training_data import domains_of, passages_of
from moe_fast.encoding.lengths import counted_truncation

_USAGE_TEXTS = 500


def draw(folder: Path, trainer: Any, texts: Any, options: SimpleNamespace) -> list[str]:
    """Draw the training curves and, for a mixture, the experts' usage.

    Returns:
        The names of the files, or a note that there are no pictures because a library is missing.
    """
    from moe_fast.evaluation.plots import plot_expert_usage, plot_training

    try:
        plot_training(trainer.state.log_history, folder / "training.png")
    except ImportError as error:
        return [f"no pictures ({error})"]
    encoder = trainer.model.transformers_model
    if not hasattr(encoder, "moe_mlps"):
        return ["training.png"]
    # rows spread over the whole data set, because the first rows may all have the same domain
    rows = texts.select(range(0, len(texts), -(-len(texts) // _USAGE_TEXTS)))
    with _as_trained(trainer.model, options.max_length_passage):
        names, usage = usage_by_domain(
            trainer.model,
            passages_of(rows),
            list(rows["domain"]) if domains_of(rows) else [],
            prompt=options.passage_prompt,
            truncate=True,
        )
    plot_expert_usage(
        {"trained": usage}, names, folder / "expert_usage.png", layers=encoder.config.moe_layers
    )
    return ["training.png", "expert_usage.png"]


@contextmanager
def _as_trained(model: Any, max_length: int | None) -> Iterator[None]:
    """Cut texts as in training, within the block, and without the warnings that training gave."""
    limit = model.max_seq_length
    model.max_seq_length = max_length or limit
    try:
        with counted_truncation():
            yield
    finally:
        model.max_seq_length = limit
