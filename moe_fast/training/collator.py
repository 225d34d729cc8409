"""Collates rows into batches: adds domain ids, samples the positive and negatives of an epoch."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn

from moe_fast import compat
from moe_fast.ops.checks import check_count
from moe_fast.training.domain_ids import to_domain_ids
from moe_fast.training.hashing import stable_hash
from moe_fast.training.row_sampling import draw_passages, has_flag_columns, is_swapped


@dataclass
class DomainDataCollator(SentenceTransformerDataCollator):
    """Tokenizes the text columns of a batch, and converts the domain column to domain ids.

    sentence-transformers' own collator treats every column that is no label as a text. It would
    embed a domain column as one more hard negative. This collator removes the domain column, and
    adds for each text column:

    - ``{column}_domain_ids``: [B] int64, indices into ``domains``;
    - ``{column}_expert_ids``: [B] int64, the same, if ``emit_expert_ids`` (enforced routing);
    - ``{column}_text_hash``: [B] int64, equal for equal raw texts, in any process.

    FlagEmbedding rows (``query``, ``pos``, ``neg``, ...) become columns of texts, see
    :func:`moe_fast.training.row_sampling.draw_passages`. :meth:`for_training` returns a collator
    that samples passages in each epoch and swaps pairs; the collator itself, which is for
    evaluation, takes the first passages and swaps nothing.

    Texts longer than the limit are truncated, as in sentence-transformers; the first batch with
    such a text gives a warning. ``truncated`` counts the texts that reached the limit, and
    ``collated`` all texts. (A data loader's workers have their own counts.)

    Args:
        preprocess_fn: the model's ``preprocess``.
        domains: the model's domains, in the order of their ids.
        domain_column: the dataset's column of domain names or integer ids; ``None`` for data
            without domains.
        emit_expert_ids: add the expert ids, for a model with enforced routing, whose expert ids are
            its domain ids.
        num_negatives: the number of negatives to take from each FlagEmbedding row, >= 0.
        swap_pairs: in training, exchange the two texts of a pair in half of the epochs.
        seed: of the draws and the swaps.
        max_length: the largest number of tokens per text, including prompt and special tokens, at
            most the model's own limit. One number, or {column: number}; the key "negative" is for
            negative_1, negative_2, ...
        prompts: an instruction that is put in front of each text: one, or one per column likewise.
        valid_label_columns, router_mapping: as in sentence-transformers.

    Raises:
        TypeError: ``domains`` is not a list of names, or ``num_negatives`` is not an int.
        ValueError: there is a domain column but no domains, or two domains have the same name.
        ValueError: ``num_negatives`` is negative, or a length is below 1 or above the model's
            limit.
        ValueError, TypeError: when a batch is collated, the domain column is missing or has a
            domain that is not in ``domains``; rows cannot be sampled or swapped.
    """

    domains: Sequence[str] = ()
    domain_column: str | None = "domain"
    emit_expert_ids: bool = False
    num_negatives: int = 1
    swap_pairs: bool = False
    seed: int = 0

    truncated: int = field(default=0, init=False, repr=False)
    collated: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        compat.check_overrides(type(self))
        if isinstance(self.domains, str) or not all(isinstance(d, str) for d in self.domains):
            raise TypeError(f"domains must be a list of names; got {self.domains!r}.")
        self.domains = list(self.domains)
        if not self.domains and self.domain_column is not None:
            raise ValueError(
                "domains must name at least one domain; got none. A model made by "
                "moe_fast.upcycle(..., domains=[...]) knows its own; for any other, pass them, or "
                "domain_column=None where the data have none."
            )
        if len(set(self.domains)) < len(self.domains):
            raise ValueError(f"domains must differ from each other; got {self.domains}.")
        check_count("num_negatives", self.num_negatives, at_least=0)
        self._check_max_length()
        self._training = False
        # In shared memory, because data loader workers that live for many epochs must see changes.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @classmethod
    def from_model(cls, model: nn.Module, **kwargs: Any) -> DomainDataCollator:
        """Make a collator with the tokenizer, domains and routing of a model.

        Args:
            model: a ``SentenceTransformer`` or ``SparseEncoder`` with a mixture that knows its
                domains. For any other model, give ``domains=[...]`` or ``domain_column=None`` as
                well.
            **kwargs: further arguments of the constructor; they override those from the model.
        """
        config = getattr(model, "config", None)
        kwargs.setdefault("preprocess_fn", model.preprocess)
        kwargs.setdefault("domains", getattr(config, "domains", None) or ())
        kwargs.setdefault("emit_expert_ids", getattr(config, "routing", None) == "enforced")
        return cls(**kwargs)

    def for_training(self) -> DomainDataCollator:
        """Return a copy for training, which samples anew in each epoch; both share the epoch."""
        collator = copy.copy(self)
        collator._training = True
        return collator

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch to sample for, also in data loader workers that are already running."""
        self._epoch.fill_(epoch)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows of the dataset into the tensors of a batch; no rows give an empty dict."""
        if not features:
            return {}
        domain_ids = self._domain_ids(features)
        epoch = int(self._epoch) if self._training else None
        rows = [self._texts(row, epoch) for row in features]
        batch = super().__call__(rows)
        for column in rows[0]:
            if f"{column}_input_ids" not in batch:
                continue  # a label, or a column that holds no text
            if domain_ids is not None:
                batch[f"{column}_domain_ids"] = domain_ids.clone()
                if self.emit_expert_ids:
                    batch[f"{column}_expert_ids"] = domain_ids.clone()
            texts = [row[column] for row in rows]
            if all(isinstance(text, str) for text in texts):
                hashes = [stable_hash(text) for text in texts]
                batch[f"{column}_text_hash"] = torch.tensor(hashes, dtype=torch.int64)
            self._count_truncated(column, batch)
        return batch

    def _texts(self, row: dict[str, Any], epoch: int | None) -> dict[str, Any]:
        """Return the row's text columns and its label, after sampling and swapping."""
        row = {k: v for k, v in row.items() if k != self.domain_column}
        if has_flag_columns(row):
            return draw_passages(row, self.num_negatives, self.seed, epoch)
        if self.swap_pairs and epoch is not None:
            first, second = self._pair_of(row)
            if is_swapped(row[first], row[second], self.seed, epoch):
                row[first], row[second] = row[second], row[first]
        return row

    def _pair_of(self, row: dict[str, Any]) -> list[str]:
        no_texts = {"dataset_name", *self.valid_label_columns}
        columns = [name for name in row if name not in no_texts]
        if len(columns) != 2:
            raise ValueError(
                f"swap_pairs needs rows of two texts; got the columns {columns}. A hard negative "
                "is one of its query alone."
            )
        return columns

    def _domain_ids(self, features: list[dict[str, Any]]) -> Tensor | None:
        if self.domain_column is None:
            return None
        if self.domain_column not in features[0]:
            raise ValueError(
                f"the dataset has no column {self.domain_column!r} (domain_column) to take each "
                f"row's domain from; its columns are {list(features[0])}."
            )
        return to_domain_ids([row[self.domain_column] for row in features], self.domains)

    # --- lengths and prompts ---------------------------------------------------------------------

    @compat.overrides
    def _get_prompt_for_column(self, prompts: Any, column_name: str) -> str | None:
        if isinstance(prompts, dict):
            return of_column(prompts, column_name)
        return super()._get_prompt_for_column(prompts, column_name)

    @compat.overrides
    def _get_task_for_column(
        self, column_name: str, column_position: int, router_mapping: dict[str, str]
    ) -> str | None:
        # sentence-transformers asks for the length right after this, by task and without the
        # column: remember the column.
        self._column = column_name
        return super()._get_task_for_column(column_name, column_position, router_mapping)

    @compat.overrides
    def _get_max_length_for_task(self, task: str | None) -> int | None:
        return of_column(self.max_length, self._column)

    def _check_max_length(self) -> None:
        if self.max_length is None:
            return
        by_column = self.max_length if isinstance(self.max_length, dict) else {"": self.max_length}
        limit = self._model_limit()
        for length in by_column.values():
            if not isinstance(length, int) or length < 1:
                raise ValueError(
                    f"max_length must be a positive integer, or one per column; got "
                    f"{self.max_length!r}."
                )
            if limit is not None and length > limit:
                raise ValueError(
                    f"max_length={self.max_length!r} goes beyond the model's max_seq_length, "
                    f"{limit} tokens."
                )

    def _model_limit(self) -> int | None:
        return getattr(getattr(self.preprocess_fn, "__self__", None), "max_seq_length", None)

    def _count_truncated(self, column: str, batch: dict[str, Any]) -> None:
        """Count the texts that have the largest length allowed, which may have been truncated."""
        limit = of_column(self.max_length, column) or self._model_limit()
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


def of_column(settings: Any, column: str) -> Any:
    """Return the setting of a column.

    Settings that are no mapping are for all columns. A mapping is searched for the column's name,
    then for the name without its number; the result is None if it has neither.
    """
    if not isinstance(settings, Mapping):
        return settings
    return settings.get(column, settings.get(re.sub(r"_\d+$", "", column)))
