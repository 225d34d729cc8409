"""Reads a text column's features for the losses, and selects those that the encoder receives.

The features are dicts of tensors as sentence-transformers' trainer makes them, plus the keys that
:class:`moe_fast.training.DomainDataCollator` adds: ``text_hash``, ``domain_ids``, ``expert_ids``,
each [B] int64 for B texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_HASH_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer


def encoder_features(model: nn.Module, features: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shallow copy of ``features`` without the keys that this encoder does not use.

    ``text_hash`` and ``group_ids`` are always removed, ``domain_ids`` unless the encoder's config
    names domains, ``expert_ids`` unless its routing is "enforced". The config is also found inside
    wrappers (DDP, ``torch.compile``).
    """
    config = encoder_config(model)
    drop = {"text_hash", "group_ids"}
    if not getattr(config, "domains", None):
        drop.add("domain_ids")
    if not getattr(config, "num_experts", None) or getattr(config, "routing", "") != "enforced":
        drop.add("expert_ids")
    return {key: value for key, value in features.items() if key not in drop}


def encoder_config(model: nn.Module) -> Any:
    """Return the config of the first submodule that has one; None if no submodule has one."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in configs if config is not None), None)


def text_ids(columns: Sequence[Mapping[str, Any]]) -> list[Tensor] | None:
    """Return ids, [B] int64 per column, that are equal for equal texts; they find duplicates.

    The ids are the collator's hashes of the raw texts if every column has them. Otherwise they are
    hashes of the tokens of every column (equal texts have equal tokens). None if there are neither
    hashes nor tokens in every column (images, for example).
    """
    if all("text_hash" in column for column in columns):
        return [column["text_hash"] for column in columns]
    if all("input_ids" in column and column["input_ids"].ndim == 2 for column in columns):
        return [_token_hash(c["input_ids"], c.get("attention_mask")) for c in columns]
    return None


def _token_hash(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hash each row of the tokens [B, L] to an int64, [B], whatever the padding; without a sync.

    The hash is a polynomial modulo 2^64 (integer products wrap), sum_p (token_p + 1) * m^(p + 1)
    over the positions p among the row's real tokens; its bits are mixed at the end.
    """
    tokens = input_ids.to(torch.int64) + 1
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(torch.int64)
    powers = tokens.new_full((tokens.shape[1],), _HASH_MULTIPLIER).cumprod(0)
    position = (mask.cumsum(1) - 1).clamp(min=0)  # of real tokens: padding may be on either side
    value = tokens * powers[position] * mask
    total = value.sum(1) * _HASH_MULTIPLIER
    return total ^ (total >> 32)
