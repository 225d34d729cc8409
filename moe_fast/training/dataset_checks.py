"""Checks the datasets before training starts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from moe_fast.losses import RouterLoss
from moe_fast.training.collator import of_column
from moe_fast.training.domain_ids import to_domain_ids
from moe_fast.training.row_sampling import (
    FLAG_COLUMNS,
    NEGATIVE_QUERIES,
    NEGATIVES,
    QUERY,
    check_flag_row,
    flag_row_columns,
    has_flag_columns,
)

_ROWS_AT_ONCE = 10_000
_NUMBERS = ("bool", "int", "uint", "float", "decimal")  # first parts of the names of number types


def flatten(**datasets: Any) -> dict[str, Any]:
    """Return {name: dataset}; datasets inside a mapping are named ``{name}.{part}``."""
    flat = {}
    for name, dataset in datasets.items():
        parts = dataset if isinstance(dataset, Mapping) else {"": dataset}
        for part, data in parts.items():
            if getattr(data, "column_names", None) is not None:
                flat[f"{name}.{part}".rstrip(".")] = data
    return flat


def check_column_names(
    datasets: Mapping[str, Any], domain_column: str, labels: Sequence[str]
) -> None:
    """Raise an error for columns that would be embedded as texts, but are meant for something else.

    sentence-transformers treats every column except the label as a text.

    Raises:
        ValueError: a column has nearly the name of the domain or the label column, or it holds
            numbers. The error names the dataset and the column.
    """
    for name, data in datasets.items():
        columns = list(data.column_names)
        label = next((c for c in labels if c in columns), None)
        for column in columns:
            if column in (domain_column, label, "dataset_name"):
                continue
            meant = next((n for n in (domain_column, *labels) if _plain(n) == _plain(column)), None)
            if meant is not None and not (meant in columns and column in labels):
                role = "domain (domain_column)" if meant == domain_column else "label"
                raise ValueError(
                    f"the {name} dataset has the column {column!r}, which would be embedded as a "
                    f"text. If it is the {role}, call it {meant!r}: "
                    f"dataset.rename_column({column!r}, {meant!r}); otherwise give it another name "
                    f"or remove it: dataset.remove_columns({column!r})."
                )
            kind = getattr((data.features or {}).get(column), "dtype", "string")
            if column not in labels and kind.startswith(_NUMBERS):
                raise ValueError(
                    f"the {name} dataset has the column {column!r} of {kind}, which is no text. "
                    f"Remove it: dataset.remove_columns({column!r})."
                )


def _plain(name: str) -> str:
    """Normalize a column's name: case, underscores, spaces and a final "s" do not count."""
    return "".join(c for c in name.casefold() if c.isalnum()).removesuffix("s")


def has_domain_column(datasets: Mapping[str, Any], column: str) -> bool:
    """Return whether the datasets have the domain column.

    Raises:
        ValueError: only some of the datasets have it.
    """
    has = {name: column in data.column_names for name, data in datasets.items()}
    if any(has.values()) and not all(has.values()):
        raise ValueError(
            f"every dataset must have the column {column!r} (domain_column), or none; "
            f"it is missing from {[name for name, found in has.items() if not found]}."
        )
    return any(has.values())


def domain_names(datasets: Mapping[str, Any], column: str) -> list[str]:
    """Return all domain names in the datasets, sorted. A streamed dataset is read once for this.

    Raises:
        ValueError: the column holds anything but names.
    """
    values = {value for data in datasets.values() for value in _unique(data, column)}
    if not all(isinstance(value, str) for value in values):
        raise ValueError(
            f"the model knows no domains and column {column!r} holds {sorted(map(repr, values))}, "
            "not names; pass data_collator=DomainDataCollator.from_model(model, domains=[...])."
        )
    return sorted(values)


def check_domains(datasets: Mapping[str, Any], column: str, domains: Sequence[str]) -> None:
    """Raise an error for domains that the model does not know.

    A warning says if the training data have only one domain and the model has several. Streamed
    datasets are not checked here but by the collator.

    Raises:
        ValueError: a row has no domain.
        ValueError, TypeError: as :func:`moe_fast.training.domain_ids.to_domain_ids`.
    """
    trained: set[int] = set()
    for name, data in datasets.items():
        if not hasattr(data, "__len__"):
            return
        values = list(_unique(data, column))
        if None in values:
            raise ValueError(f"the {name} dataset has rows without a domain in column {column!r}.")
        ids = to_domain_ids(values, domains).tolist()
        if name.split(".")[0] == "train":
            trained.update(ids)
    if len(trained) == 1 and len(domains) > 1:
        warnings.warn(
            f"the training data hold one domain only, {domains[trained.pop()]!r}, and the model "
            f"has {len(domains)}: it cannot learn to tell them apart, and losses over domains "
            "(mutual information, expert supervision, negatives from the same domain) have "
            "nothing to compare.",
            stacklevel=2,
        )


def check_flag_rows(datasets: Mapping[str, Any], num_negatives: int) -> None:
    """Raise an error for FlagEmbedding rows that have no passages to sample.

    A warning says how many rows have fewer than `num_negatives` negatives. Only the lengths of the
    lists are read. Streamed datasets are not checked here but by the collator.

    Raises:
        ValueError: :func:`moe_fast.training.row_sampling.check_flag_row` refuses a row; the error
            has its number.
    """
    for name, data in datasets.items():
        if not has_flag_columns(data.column_names) or not hasattr(data, "__len__"):
            continue
        short = 0
        for row, lengths in enumerate(_list_lengths(data)):
            check_flag_row(lengths, num_negatives, f"row {row} of the {name} dataset")
            short += (lengths[NEGATIVES] or 0) < num_negatives
        if short:
            warnings.warn(
                f"{short} of {len(data)} rows of the {name} dataset have fewer than "
                f"num_negatives={num_negatives} negatives: theirs are repeated.",
                stacklevel=2,
            )


def text_columns(
    columns: Iterable[str], num_negatives: int, domain_column: str | None, labels: Sequence[str]
) -> list[str]:
    """Return the text columns that a batch will have, in order.

    Raises:
        ValueError: a dataset of FlagEmbedding rows has further columns.
    """
    texts = [c for c in columns if c != domain_column]
    if not has_flag_columns(texts):
        label = next((c for c in labels if c in texts), None)  # sentence-transformers has only one
        return [c for c in texts if c != label]
    if others := [c for c in texts if c not in FLAG_COLUMNS]:
        raise ValueError(
            f"rows of {QUERY}, pos and neg may have the columns {list(FLAG_COLUMNS)} besides; "
            f"got {others} too. Remove them: dataset.remove_columns({others})."
        )
    return flag_row_columns(num_negatives, NEGATIVE_QUERIES in texts)


def check_swappable(columns: Mapping[str, Sequence[str]], *settings: Any) -> None:
    """Raise an error if pairs cannot be swapped.

    Args:
        columns: {training dataset: its text columns}.
        *settings: the prompts and the lengths, each one for all or by column.

    Raises:
        ValueError: a dataset does not have exactly two text columns, or they have different
            settings.
    """
    for name, texts in columns.items():
        if len(texts) != 2:
            raise ValueError(
                f"swap_pairs needs rows of two texts, but the {name} dataset has {list(texts)}."
            )
        for setting in settings:
            first, second = (of_column(setting, text) for text in texts)
            if first != second:
                raise ValueError(
                    f"swap_pairs is for texts that are treated alike, but {texts[0]!r} has "
                    f"{first!r} and {texts[1]!r} has {second!r} (prompts, max_length)."
                )


def check_exchanges(losses: Mapping[str, nn.Module]) -> None:
    """Raise an error if the losses of several datasets exchange different sums between processes.

    In one step the processes may have batches of different datasets. If only some of them send a
    message, or send it in another size, the others hang or fail.

    Raises:
        ValueError: the losses exchange different sums; the error says which.
    """
    exchanged = {
        name: [
            (*(term for term, weight in router.coefficients.items() if weight), router.num_domains)
            for router in loss.modules()
            if isinstance(router, RouterLoss)
        ]
        for name, loss in losses.items()
    }
    if any(sums != next(iter(exchanged.values())) for sums in exchanged.values()):
        raise ValueError(
            "with several processes the losses of all datasets must be in RouterLosses of the same "
            f"terms and num_domains, or none; got {exchanged}."
        )


def check_settings_match(name: str, settings: Any, columns: Iterable[str]) -> None:
    """Raise an error if a setting names a column that no dataset has, as it would have no effect.

    Raises:
        ValueError: a column does not exist; the error lists the text columns.
    """
    columns = list(dict.fromkeys(columns))
    if not isinstance(settings, Mapping) or any(isinstance(v, Mapping) for v in settings.values()):
        return  # one setting for all columns, or one mapping per dataset
    unknown = [k for k in settings if not any(of_column({k: True}, c) for c in columns)]
    if unknown:
        raise ValueError(f"{name} names {unknown}, but the text columns are {columns}.")


def _unique(dataset: Any, column: str) -> Iterable[Any]:
    if hasattr(dataset, "__len__"):
        return dataset.unique(column)
    return (row[column] for row in dataset)


def _list_lengths(dataset: Any) -> Iterator[dict[str, int | None]]:
    """Yield, for every row, {list column: length of its list, or None for a missing list}."""
    import pyarrow.compute as pc

    names = [n for n in FLAG_COLUMNS if n in dataset.column_names and n != QUERY]
    table = dataset.select_columns(names).with_format("arrow")
    for batch in table.iter(batch_size=_ROWS_AT_ONCE):
        lengths = [pc.list_value_length(batch[n]).to_pylist() for n in names]
        for row in zip(*lengths, strict=True):
            yield dict(zip(names, row, strict=True))
