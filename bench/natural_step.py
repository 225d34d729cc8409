"""A training step on texts of natural lengths: packed against padded.

The mixture of :mod:`bench.embedding` (all-MiniLM-L6-v2, E=8, K=1, learned router), one batch of
questions and answers cut to 256 tokens, forward, loss, backward and AdamW, no gradient cache.

- ``moe_fast``: ``attn_implementation="moe_fast"``, which packs, our experts, ``InfoNCELoss``.
- ``padded, ours``: the same without packing.
- ``padded, eager``: the same weights, transformers' eager loop over experts, and
  sentence-transformers' ``MultipleNegativesRankingLoss``, which holds the logits of the batch.

``--data`` names a file of JSON lines with a question ``a`` and an answer ``b``, such as MedQuAD's;
without it, words are drawn at random, as many per text as there. Loss and gradients are compared
without dropout before anything is timed; dropout is the checkpoint's own while it is. The learning
rate is 0, so that every step starts where the first did.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from moe_fast import MoESentenceTransformer, available_backends
from moe_fast.demo.pretrained import go_offline, pretrained_folder
from moe_fast.losses import InfoNCELoss

from .embedding import EXPERTS, MAX_TOKENS, mixture, random_texts, with_eager_experts
from .harness import Result, compare, environment, table, write_json

OURS, PADDED, EAGER = "moe_fast", "padded, ours", "padded, eager"
TARGET = 1.5
# Relative L2 error in float32, through six layers; a token in another expert gives 1e-2 and more.
TOLERANCE = 1e-3
Pair = tuple[str, str]
Columns = list[dict[str, Tensor]]


def read_pairs(path: str | None, count: int) -> list[Pair]:
    """``count`` pairs with different answers from the file, or random ones."""
    if path is None:
        draw = random.Random(1)
        answers = random_texts(count)
        return [(" ".join(draw.sample(text.split(), 3)), text) for text in answers]
    pairs: dict[str, Pair] = {}
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        for line in lines:
            row = json.loads(line)
            pairs.setdefault(row["b"], (row["a"], row["b"]))
            if len(pairs) == count:
                return list(pairs.values())
    raise ValueError(f"--batch must be at most {len(pairs)}, what {path} holds; got {count}.")


def models(dtype: torch.dtype) -> dict[str, MoESentenceTransformer]:
    """The mixture packed, padded, and padded with the eager loop: equal weights."""
    dense = SentenceTransformer(str(pretrained_folder()), device="cpu")
    dense.max_seq_length = MAX_TOKENS
    padded = mixture(dense, dtype)
    packed = copy.deepcopy(padded)
    packed.transformers_model.set_attn_implementation("moe_fast")
    return {OURS: packed, PADDED: padded, EAGER: with_eager_experts(padded)}


def losses(candidates: Mapping[str, MoESentenceTransformer]) -> dict[str, nn.Module]:
    """Equal losses: one-way, cosine, temperature 0.05; no pairs are masked."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    return {
        name: MultipleNegativesRankingLoss(model)
        if name == EAGER
        else InfoNCELoss(model, mask_duplicates=False)
        for name, model in candidates.items()
    }


def gradients(model: nn.Module, loss: nn.Module, columns: Columns) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter, without dropout."""
    model.eval()
    value = loss([dict(column) for column in columns], None)
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    return {"loss": value.detach(), **found}


def check_gradients(found: Mapping[str, Mapping[str, Tensor]], tolerance: float) -> None:
    """Raise unless all have ours' loss and gradient, as one vector, within ``tolerance``."""
    ours = found[OURS]
    for name, theirs in found.items():
        if theirs.keys() != ours.keys():
            raise AssertionError(f"{name}: gradients of {sorted(theirs.keys() ^ ours.keys())}.")
        for what, keys in (("loss", ["loss"]), ("gradient", [k for k in ours if k != "loss"])):
            a, b = (torch.cat([v[k].double().flatten() for k in keys]) for v in (ours, theirs))
            error = ((a - b).norm() / b.norm()).item()
            if not error <= tolerance:
                raise AssertionError(f"{name}: {what} differs from {OURS}'s by {error:.1e}.")
            print(f"{name}: {what} differs by {error:.1e} (at most {tolerance:.0e})")


def check_finite(found: Mapping[str, float]) -> None:
    """Raise if a loss is not a number; with dropout the losses differ by their draws."""
    if not all(map(math.isfinite, found.values())):
        raise AssertionError(f"losses must be finite; got {dict(found)}.")


def step(model: nn.Module, loss: nn.Module, columns: Columns) -> Callable[[], float]:
    """One training step; returns the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def run() -> float:
        optimizer.zero_grad()
        value = loss([dict(column) for column in columns], None)
        value.backward()
        optimizer.step()
        return value.item()

    return run


def measure(pairs: Sequence[Pair], dtype: torch.dtype, rounds: int) -> list[Result]:
    """All candidates on one batch."""
    candidates = models(dtype)
    by_name = losses(candidates)
    columns = [candidates[OURS].preprocess(list(texts)) for texts in zip(*pairs, strict=True)]
    tolerance = TOLERANCE if dtype == torch.float32 else 0.1  # bf16: router ties, see embedding
    check_gradients(
        {n: gradients(candidates[n], loss, columns) for n, loss in by_name.items()}, tolerance
    )
    runs = {name: step(candidates[name], loss, columns) for name, loss in by_name.items()}
    return compare(runs, baseline=OURS, check=check_finite, rounds=rounds, warmup=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="JSON lines, gzipped or not, with the fields a and b")
    parser.add_argument("--batch", type=int, default=128, help="pairs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--json", help="write the record to this file")
    arguments = parser.parse_args(argv)

    go_offline()
    pairs = read_pairs(arguments.data, arguments.batch)
    record: dict[str, Any] = {
        "environment": environment(backends=available_backends("expert_mlp")),
        "data": arguments.data is not None,
        "batch": len(pairs),
        "results": {},
    }
    for name in arguments.dtypes:
        results = measure(pairs, getattr(torch, name), arguments.rounds)
        title = f"training step, {len(pairs)} pairs of natural lengths, E={EXPERTS}, K=1, {name}"
        print(table(results, title))
        ratio = next(r.ratio.median for r in results if r.name == EAGER)
        print(f"{EAGER}: {ratio:.2f} times as long (target {TARGET})\n")
        record["results"][name] = results
    if arguments.json:
        write_json(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
