"""What a loss reads from the features of a text column, and what it may hand to the encoder.

The features are dicts of tensors as sentence-transformers' trainer makes them, plus the keys that
:class:`moe_fast.training.DomainDataCollator` adds: ``text_hash``, ``domain_ids``, ``expert_ids``,
each [B] int64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_HASH_MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer


def encoder_features(model: nn.Module, features: Mapping[str, Any]) -> dict[str, Any]:
    """A shallow copy of ``features`` without the keys this encoder has no use for.

    Wrappers (DDP, ``torch.compile``) are looked through. ``domain_ids`` stay where the encoder
    knows domains, ``expert_ids`` where it is routed by them, ``text_hash`` and ``group_ids`` never.
    """
    config = encoder_config(model)
    drop = {"text_hash", "group_ids"}
    if not getattr(config, "domains", None):
        drop.add("domain_ids")
    if not getattr(config, "num_experts", None) or getattr(config, "routing", "") != "enforced":
        drop.add("expert_ids")
    return {key: value for key, value in features.items() if key not in drop}


def encoder_config(model: nn.Module) -> Any:
    """The config of the first module that has one; None for an encoder without."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in configs if config is not None), None)


def text_ids(columns: Sequence[Mapping[str, Any]]) -> list[Tensor] | None:
    """[B] int64 per column, equal where texts are: duplicates are found by comparing them.

    They are the collator's hashes of the raw texts, or, where a column has none, a hash of every
    column's tokens (equal texts have equal tokens). None where neither is there (images).
    """
    if all("text_hash" in column for column in columns):
        return [column["text_hash"] for column in columns]
    if all("input_ids" in column and column["input_ids"].ndim == 2 for column in columns):
        return [_token_hash(c["input_ids"], c.get("attention_mask")) for c in columns]
    return None


def _token_hash(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, L] tokens to [B] int64, whatever the padding; on the device, without a sync.

    A polynomial modulo 2^64 (integer products wrap): sum_p (token_p + 1) * m^(p + 1), mixed.
    """
    tokens = input_ids.to(torch.int64) + 1
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(torch.int64)
    powers = tokens.new_full((tokens.shape[1],), _HASH_MULTIPLIER).cumprod(0)
    position = (mask.cumsum(1) - 1).clamp(min=0)  # among real tokens: whichever side is padded
    value = tokens * powers[position] * mask
    total = value.sum(1) * _HASH_MULTIPLIER
    return total ^ (total >> 32)
