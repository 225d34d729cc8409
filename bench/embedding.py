"""Embedding texts with a mixture (E=8, K=1, learned router) made from all-MiniLM-L6-v2.

- ``moe_fast``: ``MoESentenceTransformer.encode``: texts sorted by length and packed, our experts.
- ``eager, padded``: the same weights with transformers' eager loop over experts, in batches of 32
  in the order of the texts; padding is computed like any token.
- ``dense``: the model that was upcycled, ``SentenceTransformer.encode`` (sorted by length, padded).

Texts are cut to 256 tokens, and tokenizing is timed too. The experts' weights differ by 5 %, so
that a token in a wrong expert is noticed.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import moe_fast

from .cases import OURS, Candidates, Case, near
from .moe_mlp import with_eager_experts

DATA = "MOE_FAST_BENCH_DATA"
"""The variable that names a file of JSON lines, gzipped or not, a question ``a`` and an answer
``b`` in each, such as MedQuAD's; without it words are drawn at random, as many per text."""
EXPERTS, BATCH, MAX_TOKENS = 8, 32, 256
EAGER, DENSE = "eager, padded", "dense"
# In bf16 the two round differently. A token whose two best logits are that close may go to another
# expert, which changes its embedding by up to 5 %.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def cases(size: str) -> Iterator[Case]:
    """Yield one number of texts in both dtypes."""
    count = {"tiny": 4, "quick": 64, "default": 64}.get(size, 1000)
    for dtype in TOLERANCES:
        name = str(dtype).removeprefix("torch.")
        yield Case("embedding", {"texts": count}, name, partial(candidates, count, dtype))


def read_pairs(count: int) -> list[tuple[str, str]]:
    """Return ``count`` questions with different answers, from the file in ``DATA``, or random.

    Raises ``ValueError`` if the file has fewer different answers.
    """
    path = os.environ.get(DATA)
    if path is None:
        return random_pairs(count)
    pairs: dict[str, tuple[str, str]] = {}
    with gzip.open(path, "rt") if path.endswith(".gz") else open(path) as lines:
        for line in lines:
            row = json.loads(line)
            pairs.setdefault(row["b"], (row["a"], row["b"]))
            if len(pairs) == count:
                return list(pairs.values())
    raise ValueError(f"{path} holds {len(pairs)} different answers; {count} are needed.")


def random_pairs(count: int) -> list[tuple[str, str]]:
    """Make pairs of random words of six letters; about 200 per answer, as in MedQuAD."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=6)) for _ in range(5000)]
    lengths = [max(3, round(draw.lognormvariate(4.8, 0.95))) for _ in range(count)]
    answers = [draw.choices(words, k=n) for n in lengths]
    return [(" ".join(draw.sample(answer, 3)), " ".join(answer)) for answer in answers]


def pretrained() -> Any:
    """Load all-MiniLM-L6-v2 as a ``SentenceTransformer`` on the CPU."""
    from sentence_transformers import SentenceTransformer

    from moe_fast.demo.pretrained import go_offline, pretrained_folder

    go_offline()
    return SentenceTransformer(str(pretrained_folder()), device="cpu")


def dense_and_mixture(dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the pretrained model, and the upcycled one with different experts, all in use."""
    dense = pretrained()
    dense.max_seq_length = MAX_TOKENS
    moe = moe_fast.upcycle(dense, num_experts=EXPERTS, num_experts_per_tok=1)
    generator = torch.Generator().manual_seed(0)
    for mlp in moe.transformers_model.moe_mlps().values():
        for _, parameter in mlp.expert_parameters():
            parameter.data *= 1 + 0.05 * torch.randn(parameter.shape, generator=generator)
        mlp.router.weight.data.normal_(generator=generator)
    return dense.to(dtype), moe.to(dtype)


def candidates(count: int, dtype: torch.dtype) -> Candidates:
    """Make the three candidates in one dtype; ours must give the vectors of the eager loop."""
    texts = [text for _, text in read_pairs(count)]
    dense, moe = (model.eval() for model in dense_and_mixture(dtype))
    eager = with_eager_experts(moe)

    def encode(model: Any, **options: Any) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            from moe_fast.encoding.lengths import counted_truncation

            with counted_truncation():  # else every call warns how many texts were cut
                return [model.encode(texts, batch_size=BATCH, convert_to_tensor=True, **options)]

        return run

    @torch.inference_mode()
    def encode_padded() -> list[Tensor]:
        batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return [torch.cat([eager(eager.preprocess(b))["sentence_embedding"] for b in batches])]

    runs = {OURS: encode(moe, truncate=True), EAGER: encode_padded, DENSE: encode(dense)}
    return Candidates(runs, near(encode_padded(), TOLERANCES[dtype], (DENSE,)))
