"""Takes the domain column out before a collator of transformers, and hands it on as ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_fast.training.domain_ids import to_domain_ids


@dataclass
class DomainColumnCollator:
    """Any collator of transformers, for rows that have a domain: for mixtures with a head.

    ``DataCollatorForLanguageModeling``, for one, cannot pad a column of names. This gives it the
    rows without that column and adds [B] int64 to the batch that it makes: ``expert_ids`` where
    ``emit_expert_ids`` (enforced routing), ``domain_ids`` otherwise.

    Args:
        collator: takes rows, gives the tensors of a batch by name.
        domains: the model's domains, in the order of their ids.
        domain_column: the dataset's column of domain names, or of integer ids. transformers'
            ``Trainer`` drops columns that the model's forward does not name, as it does name
            "domain": with another name set ``remove_unused_columns=False``.
        emit_expert_ids: for a model with enforced routing, whose expert ids are its domain ids.

    Raises:
        ValueError: no domains, an unknown domain, an id out of range, or a missing column.
    """

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    domains: Sequence[str]
    domain_column: str = "domain"
    emit_expert_ids: bool = False

    def __post_init__(self) -> None:
        check_domain_names(self.domains)
        self.domains = list(self.domains)

    @classmethod
    def from_model(
        cls, model: nn.Module, collator: Callable[..., Any], **kwargs: Any
    ) -> DomainColumnCollator:
        """The collator for a mixture: its domains and routing.

        Args:
            model: a mixture that knows its domains, or any other with ``domains=[...]`` among the
                keyword arguments.
            collator: transformers'.
            **kwargs: further arguments of the constructor; they go before the model's.
        """
        config = getattr(model, "config", None)
        kwargs.setdefault("domains", getattr(config, "domains", None) or ())
        kwargs.setdefault("emit_expert_ids", getattr(config, "routing", None) == "enforced")
        return cls(collator, **kwargs)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates rows of the dataset into the tensors of a batch."""
        values = column_of(features, self.domain_column)
        ids = to_domain_ids(values, self.domains)
        rows = [{k: v for k, v in row.items() if k != self.domain_column} for row in features]
        name = "expert_ids" if self.emit_expert_ids else "domain_ids"
        return {**self.collator(rows), name: ids}


def check_domain_names(domains: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these are the names of domains, at least one."""
    if isinstance(domains, str) or not all(isinstance(name, str) for name in domains):
        raise TypeError(f"domains must be a list of names; got {domains!r}.")
    if not domains:
        raise ValueError(
            "domains must name at least one domain; got none. A model made by "
            "moe_fast.upcycle(..., domains=[...]) knows its own; for any other, pass them."
        )
    if len(set(domains)) < len(domains):
        raise ValueError(f"domains must differ from each other; got {list(domains)}.")


def column_of(features: list[dict[str, Any]], column: str) -> list[Any]:
    """The values of the domain column.

    Raises:
        ValueError: for rows that have none, or do not have it any more.
    """
    missing = next((row for row in features if column not in row), None)
    if missing is not None:
        raise ValueError(
            f"the dataset has no column {column!r} (domain_column) to take each row's domain from; "
            f"its columns are {list(missing)}. transformers' Trainer has dropped it where the "
            "model's forward has no argument of that name: set remove_unused_columns=False."
        )
    return [row[column] for row in features]
