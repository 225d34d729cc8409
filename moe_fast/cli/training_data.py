"""Reads training data from files that have one domain each or a column of domains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from moe_fast.cli.command import Run
from moe_fast.cli.options import column_names, delimiter_for


def read_data(
    sources: list[str], positives_only: bool, keep: Sequence[str] = (), **reading: Any
) -> Any:
    """Read training data from all sources into one dataset.

    Args:
        sources: files or dataset ids. DOMAIN=FILE gives all rows of the file that domain.
        positives_only: leave out pairs with label 0. Otherwise they are an error, because a
            contrastive loss would treat them as positives.
        keep: further columns to read.
        **reading: further arguments of `read_sources`.

    Raises:
        ValueError: there are pairs with label 0, unless `positives_only`, or none with label 1.
        ValueError: as `read_sources` and `moe_fast.data.read_training_data`.
    """
    from moe_fast.data import read_training_data

    def read(path: str, **own: Any) -> Any:
        return _positives(read_training_data(path, keep=keep, **own), path, positives_only)

    return read_sources(sources, read, **reading)


def reading_of(options: SimpleNamespace) -> dict[str, Any]:
    """Return those of a command's parameters that `read_sources` takes."""
    return {name: getattr(options, name) for name in ("columns", "delimiter", "skip_invalid")}


def read_sources(
    sources: Sequence[str],
    read: Callable[..., Any],
    *,
    columns: Sequence[str] | None = None,
    delimiter: str | None = None,
    skip_invalid: bool = False,
) -> Any:
    """Read all sources into one dataset; DOMAIN=FILE gives all rows of the file that domain.

    Args:
        sources: see `read_data`.
        read: a function that reads a path, with ``columns``, ``delimiter`` and ``skip_invalid``.
        columns: the values of ``--columns``, for every source.
        delimiter: the value of ``--delimiter``, for the CSV files among the sources.
        skip_invalid: leave out rows that cannot be read, with a warning.

    Raises:
        ValueError: the sources have different columns.
        ValueError: DOMAIN=FILE names a file that has a column ``domain``.
        typer.BadParameter: `columns` or `delimiter` cannot be parsed.
    """
    from datasets import concatenate_datasets

    from moe_fast.data.sources import split_domain

    names = column_names(columns)
    parts: list[Any] = []
    for source in sources:
        domain, path = split_domain(source)
        character = delimiter_for(path, delimiter)
        rows = read(path, columns=names, delimiter=character, skip_invalid=skip_invalid)
        if domain is not None:
            if "domain" in rows.column_names:
                raise ValueError(f"{source}: the file has a column 'domain' already")
            rows = rows.add_column("domain", [domain] * len(rows))
        parts.append(rows)
        if set(rows.column_names) != set(parts[0].column_names):
            raise ValueError(
                f"{source}: columns {sorted(rows.column_names)}, but {sources[0]} has "
                f"{sorted(parts[0].column_names)}; all files must have the same"
            )
    return concatenate_datasets(parts)


def _positives(rows: Any, path: str, positives_only: bool) -> Any:
    """Keep the pairs with label 1, and remove the column ``label``.

    Raises:
        ValueError: there are pairs with label 0, unless `positives_only`, or none with label 1.
    """
    if "label" not in rows.column_names:
        return rows
    positive = [row for row, label in enumerate(rows["label"]) if label == 1]
    others = len(rows) - len(positive)
    if others and not positives_only:
        raise ValueError(
            f"{path}: {others} of {len(rows)} pairs have label 0, and a contrastive loss takes "
            "every pair for a positive one; pass --positives-only to leave them out"
        )
    if not positive:
        raise ValueError(f"{path}: no pair has label 1")
    return rows.select(positive).remove_columns("label")


def for_loss(rows: Any, loss: str, run: Run) -> Any:
    """Drop the column ``neg_q`` unless the loss is clp, the only one that uses it.

    Other losses would treat these queries as hard negatives. A note says that they are dropped.

    Raises:
        ValueError: the loss is a distillation, and the rows have no teacher scores.
    """
    distils = loss in ("distillation", "listwise_distillation")
    if distils and not {"pos_scores", "neg_scores"} <= set(rows.column_names):
        raise ValueError(
            f"--loss {loss} needs FlagEmbedding rows with pos_scores and neg_scores; the "
            f"columns are {', '.join(rows.column_names)}"
        )
    if loss != "clp" and "neg_q" in rows.column_names:  # they would become hard negatives
        run.say(f"neg_q, the queries of negatives, is for --loss clp; {loss} does without")
        return rows.remove_columns("neg_q")
    return rows


def passages_of(rows: Any) -> list[str]:
    """Return the passage of each row, or the first if it has several."""
    if "pos" in rows.column_names:
        return [texts[0] for texts in rows["pos"]]
    return list(rows["b"])


def domains_of(rows: Any) -> list[str]:
    """Return the names of the domains, sorted; none if there is no column ``domain``."""
    return sorted(rows.unique("domain")) if "domain" in rows.column_names else []


def check_domains(model: Any, rows: Any, allow_one: bool) -> None:
    """Raise an error if the domains of the training data do not suit the model.

    Raises:
        ValueError: the data have only one domain and the model several, unless `allow_one`.
        ValueError: the data have no domains, and the model routes by domain and has no default.
    """
    config = model.transformers_model.config
    known, found = list(getattr(config, "domains", ())), domains_of(rows)
    if len(known) > 1 and len(found) == 1 and not allow_one:
        raise ValueError(
            f"the training data hold one domain only, {found[0]!r}; the model has {len(known)} "
            f"({', '.join(known)}). Pass --allow-one-domain if that is meant."
        )
    routing = getattr(config, "routing", None)
    if routing == "enforced" and not found and config.default_domain is None:
        raise ValueError(
            "the model routes by domain, and the training data have no column 'domain'; add one, "
            f"or pass --data DOMAIN=FILE. Known domains: {', '.join(known)}"
        )


def rows_per_expert(model: Any, rows: Any) -> dict[str, int]:
    """Return {domain: training rows} of a model with an expert per domain, and {} of another."""
    config = model.transformers_model.config
    if getattr(config, "routing", None) != "enforced" or "domain" not in rows.column_names:
        return {}
    counts = Counter(rows["domain"])
    return {name: counts[name] for name in config.domains}


def columns_of(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the text columns of a batch that hold queries, and those that hold passages.

    Args:
        names: the columns of the training data. The columns of FlagEmbedding rows in a batch are
            those that `moe_fast.training.row_sampling.draw_passages` makes.

    Returns:
        (columns of queries, columns of passages); "negative" is for negative_1, negative_2, ...
    """
    if "pos" in names:
        queries, passages = ["query"], ["positive", "negative"]
        return queries + (["negative_query"] if "neg_q" in names else []), passages
    negatives = ["negative"] if any(name.startswith("negative_") for name in names) else []
    return ["a"], ["b", *negatives]
