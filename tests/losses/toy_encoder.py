"""A bag-of-words encoder and hand-made batches: no sentence-transformers needed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BagEncoder(nn.Module):
    """Mean of the real tokens' embeddings; remembers the features it was given."""

    def __init__(self, config: object = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(50, 6, generator=generator, dtype=torch.float64))
        self.config = config
        self.seen: list[set[str]] = []

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        self.seen.append(set(features))
        mask = features["attention_mask"][..., None].to(self.embedding.dtype)
        tokens = self.embedding[features["input_ids"]]
        return {"sentence_embedding": (tokens * mask).sum(1) / mask.sum(1)}


def column(*texts: list[int], left: bool = False, width: int | None = None, **extra: list[int]):
    """Token lists, padded with token 7 (a real token's id) and an attention mask."""
    width = width or max(map(len, texts))
    pads = [[7] * (width - len(text)) for text in texts]
    ids = [p + t if left else t + p for t, p in zip(texts, pads, strict=True)]
    ones = [[1] * len(text) for text in texts]
    zeros = [[0] * len(pad) for pad in pads]
    mask = [z + o if left else o + z for o, z in zip(ones, zeros, strict=True)]
    features = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return features | {name: torch.tensor(value) for name, value in extra.items()}


ANCHORS = [[1, 2], [3], [4, 5, 6]]
POSITIVES = [[2, 1, 8], [9, 3], [6, 4]]
HARD = [[[11], [12, 13], [14]], [[15, 16], [17], [18]]]


def embed(encoder: BagEncoder, *columns) -> list[Tensor]:
    return [encoder(c)["sentence_embedding"] for c in columns]
