"""A training step in chunks (CachedLoss) against the plain step of the same batch, where both fit.

The second forward alone costs a third: the plain step is one forward and about two forwards' worth
of backward. 4/3 of its time is the floor, but for the padding that sorting by length avoids.

- ``equal``: all texts of one length; what the chunks cost.
- ``natural``: lengths as of questions and answers, padded to each column's longest; what they save.
- ``router``: as ``equal``, with all four router losses.

Beside it stands sentence-transformers' cached loss, at its default of 32 texts per chunk and with
our budget of tokens. Losses and gradients are compared with the plain step's before any timing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses import CachedLoss, InfoNCELoss, RouterLoss
from moe_fast.models import MoEBertConfig, MoEBertModel

from .harness import Result, compare, environment, table, write_json

BASELINE = "plain"
# Float32 through six layers of random weights amplifies what batches of another shape round
# otherwise: up to 4e-5; in float64 the same comparison gives 4e-15.
MAX_RELATIVE_ERROR = 2e-4
CASES = ("equal", "natural", "router")
DOMAINS = 4
ROUTER: dict[str, Any] = {
    "load_balance": 0.05,
    "z_loss": 0.01,
    "mutual_information": 0.01,
    "expert_supervision": 0.01,
}
Columns = list[dict[str, Tensor]]


class Encoder(nn.Module):
    """A mixture with mean pooling, of random weights; stands for a ``SentenceTransformer``."""

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        settings: dict[str, Any] = dict(
            vocab_size=1000,
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=max(dim // 32, 1),
            intermediate_size=4 * dim,
            initializer_range=0.1,  # texts differ from each other, as trained ones do
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_experts=8,
            num_experts_per_tok=1,
            routing="token_topk",
            moe_layers=list(range(layers)),
        )
        self.encoder = MoEBertModel(MoEBertConfig(**settings), add_pooling_layer=False)

    def __getitem__(self, index: int) -> nn.Module:
        return self.encoder  # sentence-transformers looks at the first module's kind

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Token ids and mask [B, L] to ``sentence_embedding`` [B, dim]."""
        mask = features["attention_mask"]
        hidden = self.encoder(features["input_ids"], mask).last_hidden_state
        real = mask[..., None].to(hidden.dtype)
        return {"sentence_embedding": (hidden * real).sum(1) / real.sum(1)}


def batch(rows: int, natural: bool) -> Columns:
    """Two columns: all of 64 tokens, or short questions and answers of 8 to 128."""
    generator = torch.Generator().manual_seed(1)
    columns = []
    for mean in (16.0, 64.0) if natural else (None, None):
        lengths = torch.full((rows,), 64)
        if mean is not None:
            spread = torch.randn(rows, generator=generator).mul(0.5).exp() * mean
            lengths = spread.long().clamp(8, 128)
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = torch.randint(5, 1000, mask.shape, generator=generator) * mask
        domains = torch.arange(rows) % DOMAINS
        columns.append({"input_ids": ids, "attention_mask": mask, "domain_ids": domains})
    return columns


def step(model: nn.Module, loss: nn.Module, columns: Columns) -> Callable[[], dict[str, Tensor]]:
    """A callable that runs forward and backward, and returns the loss and all gradients."""

    def call() -> dict[str, Tensor]:
        model.zero_grad()
        value = loss([dict(column) for column in columns], None)
        value.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": value.detach(), **grads}

    return call


def check_equal(outputs: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise unless every candidate gives the plain step's loss and gradient, as one vector."""
    plain = outputs[BASELINE]
    for name, found in outputs.items():
        if found.keys() != plain.keys():
            raise AssertionError(f"{name}: gradients of {sorted(found.keys() ^ plain.keys())}.")
        for what, keys in (("loss", ["loss"]), ("gradient", [k for k in plain if k != "loss"])):
            ours, theirs = (torch.cat([v[k].flatten() for k in keys]) for v in (found, plain))
            error = ((ours - theirs).norm() / theirs.norm()).item()
            if not error <= MAX_RELATIVE_ERROR:
                raise AssertionError(f"{name}: {what} differs from the plain step by {error:.1e}.")


def measure(case: str, arguments: argparse.Namespace) -> list[Result]:
    """One case: every candidate beside the plain step."""
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
    )

    model = Encoder(arguments.layers, arguments.dim).train()
    columns = batch(arguments.rows, natural=case == "natural")
    loss: Any = InfoNCELoss(model, mask_duplicates=False)
    if case == "router":
        loss = RouterLoss(loss, num_domains=DOMAINS, **ROUTER)  # type: ignore[arg-type]
    tokens = arguments.tokens_per_chunk
    losses = {BASELINE: loss, "CachedLoss": CachedLoss(loss, tokens_per_chunk=tokens)}
    if case != "router":  # which it cannot have
        peer = CachedMultipleNegativesRankingLoss
        losses["sentence-transformers, 32 texts"] = peer(model)
        losses["sentence-transformers, tokens"] = peer(model, mini_batch_num_tokens=tokens)
    runs = {name: step(model, candidate, columns) for name, candidate in losses.items()}
    return compare(runs, baseline=BASELINE, check=check_equal, rounds=arguments.rounds, warmup=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case, print the tables, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=64, help="pairs in the batch")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--tokens-per-chunk", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--json", help="write the record to this file")
    arguments = parser.parse_args(argv)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "cases")}
    record: dict[str, Any] = {
        "environment": environment(dtype="float32", **settings),
        "floor": 4 / 3,
        "results": {},
    }
    for case in arguments.cases:
        record["results"][case] = results = measure(case, arguments)
        title = f"training step, {case}, E=8, K=1, {settings}, float32; floor of a cache 1.333"
        print(table(results, title), end="\n\n")
    if arguments.json:
        write_json(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
