"""Hands the domains of a CrossEncoder's training pairs to the model, with the texts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sentence_transformers.cross_encoder.data_collator import CrossEncoderDataCollator

from moe_fast.encoding.cross_encoder import MoECrossEncoder
from moe_fast.encoding.domain_texts import DomainText
from moe_fast.training.domain_column import check_domain_names, column_of
from moe_fast.training.domain_ids import to_domain_ids


@dataclass
class CrossEncoderDomainCollator(CrossEncoderDataCollator):
    """Rows of a ``CrossEncoder``'s dataset as a batch of texts whose first column knows its domain.

    sentence-transformers' losses for it pair and tokenize the texts themselves, and its own
    collator would hand them a domain column as one more text. This one takes it out and makes the
    texts of the first column (the queries) :class:`~moe_fast.encoding.domain_texts.DomainText`,
    which ``MoECrossEncoder`` reads, however a loss pairs them.

    Args:
        domains: the model's domains, in the order of their ids.
        domain_column: the dataset's column of domain names, or of integer ids.
        preprocess_fn, valid_label_columns, router_mapping, prompts, max_length: as in
            sentence-transformers.

    Raises:
        ValueError: no domains, an unknown domain, an id out of range, a missing column, or no
            column of texts.
    """

    domains: Sequence[str] = ()
    domain_column: str = "domain"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_domain_names(self.domains)
        self.domains = list(self.domains)

    @classmethod
    def from_model(cls, model: MoECrossEncoder, **kwargs: Any) -> CrossEncoderDomainCollator:
        """The collator of a ``MoECrossEncoder``, with its domains.

        Args:
            model: which knows its domains.
            **kwargs: further arguments of the constructor; they go before the model's.

        Raises:
            TypeError: for a stock ``CrossEncoder``, which would read no domains.
        """
        if not isinstance(model, MoECrossEncoder):
            raise TypeError(
                f"model must be a MoECrossEncoder; got {type(model).__name__}. Load it with "
                "moe_fast.MoECrossEncoder(path), or make it with moe_fast.upcycle(...)."
            )
        kwargs.setdefault("preprocess_fn", model.preprocess)
        kwargs.setdefault("domains", model.transformers_model.config.domains)
        return cls(**kwargs)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates rows of the dataset into lists of texts, and the labels."""
        if not features:
            return {}
        ids = to_domain_ids(column_of(features, self.domain_column), self.domains).tolist()
        rows = [{k: v for k, v in row.items() if k != self.domain_column} for row in features]
        batch = super().__call__(rows)
        query = self._first_text_column(rows[0])
        batch[query] = [
            DomainText(text, self.domains[i]) for text, i in zip(batch[query], ids, strict=True)
        ]
        return batch

    def _first_text_column(self, row: dict[str, Any]) -> str:
        for name, value in row.items():
            if name not in ("dataset_name", *self.valid_label_columns):
                if isinstance(value, str):
                    return name
                break
        raise ValueError(
            "the first column that is no label must hold texts (the queries), whose domain is "
            f"that of the pair; the columns are {list(row)}."
        )
