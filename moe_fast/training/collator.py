"""Batches whose rows know their domain."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn

from moe_fast.training.domains import to_domain_ids
from moe_fast.training.hashing import stable_hash


@dataclass
class DomainDataCollator(SentenceTransformerDataCollator):
    """Tokenizes the text columns of a batch and hands the domain column on as ids.

    sentence-transformers' own collator takes every column that is no label for a text: a domain
    column would be embedded, as one more hard negative. This one takes it out first and adds, for
    each text column,

    - ``{column}_domain_ids``: [B] int64, indices into ``domains``;
    - ``{column}_expert_ids``: [B] int64, the same, where ``emit_expert_ids`` (enforced routing);
    - ``{column}_text_hash``: [B] int64, equal where the raw texts are, in any process.

    Texts longer than the model's ``max_seq_length`` are truncated, as sentence-transformers does,
    and the first batch in which any reaches it says so. ``truncated`` and ``collated`` count the
    texts that reached the limit and all texts (of this process: a data loader's workers keep
    their own).

    Args:
        preprocess_fn: the model's ``preprocess``.
        domains: the model's domains, in the order of their ids.
        domain_column: the dataset's column of domain names, or of integer ids.
        emit_expert_ids: for a model with enforced routing, whose expert ids are its domain ids.
        valid_label_columns, router_mapping, prompts, max_length: as in sentence-transformers.

    Raises:
        ValueError: no domains, an unknown domain, an id out of range, or a missing column.
    """

    domains: Sequence[str] = ()
    domain_column: str = "domain"
    emit_expert_ids: bool = False

    truncated: int = field(default=0, init=False, repr=False)
    collated: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.domains, str) or not all(isinstance(d, str) for d in self.domains):
            raise TypeError(f"domains must be a list of names; got {self.domains!r}.")
        self.domains = list(self.domains)
        if not self.domains:
            raise ValueError(
                "domains must name at least one domain; got none. A model made by "
                "moe_fast.upcycle(..., domains=[...]) knows its own; for any other, pass them."
            )
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains must differ from each other; got {self.domains}.")

    @classmethod
    def from_model(cls, model: nn.Module, **kwargs: Any) -> DomainDataCollator:
        """The collator of a ``SentenceTransformer``: its tokenizer, domains and routing.

        Args:
            model: a mixture-of-experts model that knows its domains, or any other with
                ``domains=[...]`` among the keyword arguments.
            **kwargs: further arguments of the constructor; they go before the model's.
        """
        config = getattr(model, "config", None)
        kwargs.setdefault("preprocess_fn", model.preprocess)
        kwargs.setdefault("domains", getattr(config, "domains", None) or ())
        kwargs.setdefault("emit_expert_ids", getattr(config, "routing", None) == "enforced")
        return cls(**kwargs)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows of the dataset to the tensors of a batch; an empty list gives an empty dict."""
        if not features:
            return {}
        domain_ids = self._domain_ids(features)
        rows = [{k: v for k, v in row.items() if k != self.domain_column} for row in features]
        batch = super().__call__(rows)
        for column in rows[0]:
            if f"{column}_input_ids" not in batch:
                continue  # a label, or a column of something else than text
            batch[f"{column}_domain_ids"] = domain_ids.clone()
            if self.emit_expert_ids:
                batch[f"{column}_expert_ids"] = domain_ids.clone()
            texts = [row[column] for row in rows]
            if all(isinstance(text, str) for text in texts):
                hashes = [stable_hash(text) for text in texts]
                batch[f"{column}_text_hash"] = torch.tensor(hashes, dtype=torch.int64)
            self._count_truncated(column, batch)
        return batch

    def _domain_ids(self, features: list[dict[str, Any]]) -> Tensor:
        if self.domain_column not in features[0]:
            raise ValueError(
                f"the dataset has no column {self.domain_column!r} (domain_column) to take each "
                f"row's domain from; its columns are {list(features[0])}."
            )
        return to_domain_ids([row[self.domain_column] for row in features], self.domains)

    def _count_truncated(self, column: str, batch: dict[str, Any]) -> None:
        """Cheaply, from lengths alone: a text of just the allowed length counts as well."""
        limit = self._length_limit(batch.get(f"{column}_task"))
        mask = batch.get(f"{column}_attention_mask")
        if limit is None or mask is None:
            return
        reached = int((mask.sum(1) >= limit).sum())
        self.collated += len(mask)
        self.truncated += reached
        if reached and reached == self.truncated:
            warnings.warn(
                f"{reached} of {len(mask)} texts of column {column!r} reach the limit of {limit} "
                "tokens (the model's max_seq_length, or max_length) and longer ones are cut "
                "there; said once, counted in the collator's `truncated`.",
                stacklevel=2,
            )

    def _length_limit(self, task: str | None) -> int | None:
        override = self._get_max_length_for_task(task)
        model = getattr(self.preprocess_fn, "__self__", None)
        return override or getattr(model, "max_seq_length", None)
