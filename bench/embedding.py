"""Embedding texts with a mixture (E=8, K=1, learned router) made of all-MiniLM-L6-v2.

- ``moe_fast``: ``MoESentenceTransformer.encode``: sorted by length, packed, our experts.
- ``eager, padded``: the same weights, transformers' eager loop over experts, batches of 32 in the
  order of the texts, padding computed like any token.
- ``dense``: the model that was upcycled, ``SentenceTransformer.encode`` (sorted by length, padded).

``--data`` names a file of JSON lines whose field ``b`` is a text (for MedQuAD, its answers; the
first 1,000 different ones are taken, cut to 256 tokens); without it, words are drawn at random, as
many per text as those answers have. Tokenizing is part of what is timed. Experts differ by 5 %, so
that a token in a wrong expert shows: moe_fast's vectors are compared with eager's before any
timing.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

import moe_fast
from moe_fast import MoESentenceTransformer, available_backends
from moe_fast.demo.pretrained import go_offline, pretrained_folder

from .harness import Result, compare, environment, table, write_json
from .moe_mlp import eager_loop

EXPERTS, BATCH, MAX_TOKENS = 8, 32, 256
OURS, EAGER, DENSE = "moe_fast", "eager, padded", "dense"
# Norm of the difference over the norm. In bf16 the two round differently, and a token whose two
# best logits lie within that goes to another expert, which changes its embedding by up to 5 %.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
TARGETS = {EAGER: 1.8, DENSE: 1 / 1.05}


def read_texts(path: str | None, count: int) -> list[str]:
    """``count`` different texts of the file, or random ones."""
    if path is None:
        return random_texts(count)
    texts: dict[str, None] = {}
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        for line in lines:
            texts.setdefault(json.loads(line)["b"])
            if len(texts) == count:
                return list(texts)
    raise ValueError(f"--texts must be at most {len(texts)}, what {path} holds; got {count}.")


def random_texts(count: int) -> list[str]:
    """Words of six letters, as many per text as MedQuAD's answers have: 200 on average."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=6)) for _ in range(5000)]
    lengths = [max(3, round(draw.lognormvariate(4.8, 0.95))) for _ in range(count)]
    return [" ".join(draw.choices(words, k=n)) for n in lengths]


def mixture(dense: SentenceTransformer, dtype: torch.dtype) -> MoESentenceTransformer:
    """The upcycled model, its experts apart, its router sending tokens to all of them."""
    moe = moe_fast.upcycle(dense, num_experts=EXPERTS, num_experts_per_tok=1)
    generator = torch.Generator().manual_seed(0)
    for mlp in moe.transformers_model.moe_mlps().values():
        for _, parameter in mlp.expert_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data *= 1 + 0.05 * noise
        mlp.router.weight.data.normal_(generator=generator)
    return moe.to(dtype)


def with_eager_experts(moe: MoESentenceTransformer) -> MoESentenceTransformer:
    """A copy whose experts are computed as transformers does, padding included."""
    eager = copy.deepcopy(moe)
    for mlp in eager.transformers_model.moe_mlps().values():
        mlp.forward = eager_forward(mlp)
    return eager


def eager_forward(mlp: Any) -> Callable[..., Tensor]:
    """A forward of ``mlp`` by :func:`bench.moe_mlp.eager_loop`."""

    def forward(hidden_states: Tensor, **_: Any) -> Tensor:
        return eager_loop(mlp, hidden_states.flatten(0, -2)).view(hidden_states.shape)

    return forward


@torch.inference_mode()
def encode_padded(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    """Batches of 32 in the order of the texts."""
    parts = []
    for start in range(0, len(texts), BATCH):
        features = model.preprocess(list(texts[start : start + BATCH]))
        parts.append(model(features)["sentence_embedding"])
    return torch.cat(parts)


def check_same(tolerance: float) -> Callable[[dict[str, Any]], None]:
    """A check that moe_fast's vectors are eager's."""

    def check(outputs: dict[str, Any]) -> None:
        ours, theirs = outputs[OURS].double(), outputs[EAGER].double()
        error = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"moe_fast and eager differ by {error:.1e} (at most {tolerance:.0e})")
        if not error <= tolerance:
            raise AssertionError(f"vectors differ by {error:.1e}.")

    return check


def measure(texts: Sequence[str], dtype: torch.dtype, rounds: int) -> list[Result]:
    """All three, in one dtype."""
    dense = SentenceTransformer(str(pretrained_folder()), device="cpu").eval()
    dense.max_seq_length = MAX_TOKENS
    moe = mixture(dense, dtype).eval()
    eager = with_eager_experts(moe)
    dense = dense.to(dtype)
    texts = list(texts)

    def encode(model: SentenceTransformer, **options: Any) -> Callable[[], Tensor]:
        return lambda: model.encode(texts, batch_size=BATCH, convert_to_tensor=True, **options)

    candidates = {
        OURS: encode(moe, truncate=True),
        EAGER: lambda: encode_padded(eager, texts),
        DENSE: encode(dense),
    }
    check = check_same(TOLERANCES[dtype])
    return compare(candidates, baseline=OURS, check=check, rounds=rounds, warmup=0)


def verdict(results: Sequence[Result]) -> str:
    """The two targets, met or not."""
    ratios = {r.name: r.ratio.median for r in results}
    return (
        f"{EAGER}: {ratios[EAGER]:.2f} times as long (target {TARGETS[EAGER]}); "
        f"moe_fast takes {1 / ratios[DENSE]:.2f} of dense's time (target 1.05)"
    )


@contextmanager
def _without_notes() -> Iterator[None]:
    """moe_fast says at every call how many texts were cut: not here."""
    log = logging.getLogger("moe_fast")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both dtypes, print the tables, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="JSON lines, gzipped or not, with a text in the field b")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", help="write the record to this file")
    arguments = parser.parse_args(argv)

    go_offline()
    texts = read_texts(arguments.data, arguments.texts)
    record: dict[str, Any] = {
        "environment": environment(backends=available_backends("expert_mlp")),
        "texts": len(texts),
        "results": {},
    }
    for name in arguments.dtypes:
        with _without_notes():
            results = measure(texts, getattr(torch, name), arguments.rounds)
        title = f"embedding {len(texts)} texts, at most {MAX_TOKENS} tokens, E=8, K=1, {name}"
        print(table(results, title), verdict(results), sep="\n", end="\n\n")
        record["results"][name] = results
    if arguments.json:
        write_json(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
