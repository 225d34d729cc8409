"""One whole training step: embed B pairs, contrastive loss, backward, AdamW.

The encoder has MiniLM's size (6 layers, D = 384) with random weights, and is upcycled to 8 experts
in every layer. Tokens are random; nothing is downloaded or tokenized.

- ``moe_fast``: the mixture with InfoNCELoss.
- ``sentence-transformers' loss``: the same mixture with MultipleNegativesRankingLoss.
- ``its cached loss``: the same with CachedMultipleNegativesRankingLoss in chunks of 32 pairs; it
  embeds twice in order to hold the activations of only one chunk.
- ``eager loop``: the mixture with transformers' loop over experts, and sentence-transformers' loss.
- ``dense``: the model that was upcycled, and sentence-transformers' loss.

The learning rate is 0, so that every step starts from the same weights; the work is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import moe_fast
from moe_fast.losses import InfoNCELoss

from .cases import OURS, Candidates, Case, near
from .moe_mlp import with_eager_experts
from .peers import gpu_only
from .record import Work

EXPERTS, LAYERS = 8, 6
TOLERANCE = 1e-4  # for a gradient through six layers in float32
CHUNK = 32


class Encoder(nn.Module):
    """A transformer with mean pooling, in sentence-transformers' calling convention."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map ``input_ids`` and ``attention_mask`` [B, L] to embeddings [B, D]."""
        mask = features["attention_mask"]
        hidden = self.transformer(features["input_ids"], mask).last_hidden_state
        mask = mask[..., None].to(hidden.dtype)
        return {"sentence_embedding": (hidden * mask).sum(1) / mask.sum(1)}


def cases(size: str) -> Iterator[Case]:
    """Yield batches of pairs with at most 64 tokens."""
    batches = {"tiny": [4], "quick": [16], "default": [16], "full": [32, 128]}[size]
    for batch in batches:
        yield case_of(batch, *((8, 32) if size == "tiny" else (64, 384)))


def case_of(batch: int, length: int, dim: int, sweep: str | None = None) -> Case:
    """Make the case of B pairs; three quarters of the second half are padding.

    Real batches that are sorted by length have some padding, too.
    """
    return Case(
        "training step",
        {"B": batch, "L": length, "D": dim, "E": EXPERTS, "K": 1},
        "float32",
        lambda: candidates(batch, length, dim),
        work(real_tokens(batch, length), length, dim),
        sweep,
    )


def real_tokens(batch: int, length: int) -> int:
    """Count the tokens of both columns; the batch's second half has a quarter of the length."""
    return 2 * batch * length * 5 // 8


def work(tokens: int, length: int, dim: int, experts: int = EXPERTS) -> Work:
    """Count the work: thrice the products of attention and experts; AdamW on seven tensors.

    AdamW reads four tensors and writes three.
    """
    per_token = 2 * (4 * dim**2 + 8 * dim**2) + 2 * 2 * length * dim
    parameters = LAYERS * (4 * dim**2 + experts * 8 * dim**2)
    return Work(3.0 * LAYERS * tokens * per_token, 4.0 * 7 * parameters)


def candidates(batch: int, length: int, dim: int) -> Candidates:
    """Make the candidates; each steps a model of its own, all with the same initial weights."""
    dense = dense_bert(dim)
    moe = moe_fast.upcycle(dense, num_experts=EXPERTS, num_experts_per_tok=1)
    pairs = [_features(batch, length) for _ in range(2)]
    runs = {OURS: step(Encoder(moe), InfoNCELoss, pairs)}
    absent = gpu_only(attention=True)
    if find_spec("sentence_transformers") is None:
        names = ("sentence-transformers' loss", "its cached loss", "eager loop", "dense")
        reason = "needs sentence-transformers, which is not installed"
        absent |= dict.fromkeys(names, reason)
    else:
        from sentence_transformers.sentence_transformer import losses

        plain = losses.MultipleNegativesRankingLoss
        cached = partial(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=CHUNK)
        for name, model, loss in (
            ("sentence-transformers' loss", copy.deepcopy(moe), plain),
            ("its cached loss", copy.deepcopy(moe), cached),
            ("eager loop", with_eager_experts(moe), plain),
            ("dense", dense, plain),
        ):
            runs[name] = step(Encoder(model), loss, pairs)
    exact = step(Encoder(copy.deepcopy(moe).double()), InfoNCELoss, pairs)()
    works = {"dense": work(real_tokens(batch, length), length, dim, experts=1)}
    return Candidates(runs, near(exact, TOLERANCE, ("dense",)), absent, works)


def step(
    encoder: nn.Module, make_loss: Callable[[Any], nn.Module], columns: Sequence[dict[str, Tensor]]
) -> Callable[[], list[Any]]:
    """Return a function that takes one step with AdamW and returns [loss, all gradients]."""
    # The cached losses use model[0].
    loss = make_loss(nn.Sequential(encoder) if isinstance(encoder, Encoder) else encoder)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.0, weight_decay=0.0)

    def call() -> list[Any]:
        optimizer.zero_grad()
        value = loss([dict(features) for features in columns], None)
        value.backward()
        optimizer.step()
        return [value.detach(), [p.grad for p in encoder.parameters() if p.grad is not None]]

    return call


def dense_bert(dim: int, **settings: Any) -> Any:
    """Make a BERT of six layers with random weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=30522 if dim >= 384 else 100,
        hidden_size=dim,
        num_hidden_layers=LAYERS,
        num_attention_heads=max(1, dim // 32),
        intermediate_size=4 * dim,
        hidden_dropout_prob=0.0,  # else candidates would draw different masks
        attention_probs_dropout_prob=0.0,
        **settings,
    )
    return BertModel(config, add_pooling_layer=False)


def _features(batch: int, length: int) -> dict[str, Tensor]:
    """Make random tokens; the second half of the batch has a quarter of the length."""
    lengths = torch.full((batch, 1), length)
    lengths[batch // 2 :] = max(1, length // 4)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(1, 100, (batch, length)) * mask, "attention_mask": mask}
