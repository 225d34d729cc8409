"""Pads tokenized texts to the batch that sentence-transformers would make from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_fast.encoding.lengths import TokenizedText


def padded_batch(texts: Sequence[TokenizedText], tokenizer: Any) -> dict[str, Tensor]:
    """B texts of at most L tokens as ``input_ids`` [B, L] int64 and the model's other inputs.

    Args:
        texts: at least one.
        tokenizer: the one that made them; it defines the padding's id and side.
    """
    shape = len(texts), max(len(text.ids) for text in texts)
    input_ids = np.full(shape, tokenizer.pad_token_id, np.int64)
    mask = np.zeros(shape, np.int64)
    type_ids = np.full(shape, tokenizer.pad_token_type_id, np.int64)
    for i, text in enumerate(texts):
        n = len(text.ids)
        real = slice(shape[1] - n, None) if tokenizer.padding_side == "left" else slice(n)
        input_ids[i, real] = text.ids
        mask[i, real] = 1
        if text.type_ids is not None:
            type_ids[i, real] = text.type_ids
    batch = {"input_ids": input_ids}
    if texts[0].type_ids is not None:
        batch["token_type_ids"] = type_ids
    if "attention_mask" in tokenizer.model_input_names:
        batch["attention_mask"] = mask
    return {name: torch.from_numpy(values) for name, values in batch.items()}
