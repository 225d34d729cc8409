"""MaxSim of every query against every document, forward and backward, from given token vectors.

Texts are ragged: from a quarter of L vectors to L. sentence-transformers' function takes lists of
tensors, pads them in chunks and computes the products of a chunk at once; torch keeps these for its
backward pass. PyLate cannot be installed beside the releases that this package needs. Our products
alone are timed too: twice the products of all vectors, which are the floor of a forward pass and of
a backward pass that computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops
from moe_fast.ops.cpu_matmul import multiply

from .cases import OURS, Candidates, Case, near
from .record import Work

DIM = 384
TOLERANCE = 1e-4  # near ties, float32 may choose another winner, whose gradient differs
THEIRS = "sentence-transformers' maxsim"
PYLATE = "PyLate's colbert_scores"
# Of its newest release.
PINS = (
    "pylate 1.6.0 requires sentence-transformers==5.3.0 and transformers<=5.3.0; moe_fast requires "
    "sentence-transformers>=6.2 and transformers>=5.17"
)
PRODUCTS = "two products of all vectors alone"


def cases(size: str) -> Iterator[Case]:
    """Yield (texts on either side, most vectors of a text)."""
    shapes = {
        "tiny": [(3, 8)],
        "quick": [(64, 64)],
        "default": [(32, 128), (128, 128)],
    }.get(size, [(32, 128), (128, 128), (256, 128), (64, 512)])
    for texts, length in shapes:
        yield Case(
            "MaxSim, forward + backward",
            {"B": texts, "L": length, "d": DIM},
            "float32",
            partial(candidates, texts, length),
            _work(_lengths(texts, length), DIM),
        )


def _lengths(texts: int, length: int) -> Tensor:
    return torch.linspace(max(1, length // 4), length, texts).long()


def _work(lengths: Tensor, dim: int) -> Work:
    vectors = float(lengths.sum())
    # FLOP: all products, forward and again backward, and two weighted sums of winners.
    flop = 2 * 2 * vectors**2 * dim + 2 * 2 * vectors * len(lengths) * dim
    return Work(flop, 4.0 * 4 * vectors * dim)


def candidates(texts: int, length: int) -> Candidates:
    """Make ours, sentence-transformers' and the bare products."""
    lengths = _lengths(texts, length)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    leaves = [
        torch.nn.functional.normalize(torch.randn(int(starts[-1]), DIM), dim=1).requires_grad_()
        for _ in range(2)
    ]
    upstream = torch.randn(texts, texts) / texts
    runs: dict[str, Callable[[], Any]] = {
        OURS: partial(ours, leaves, starts, upstream),
        PRODUCTS: partial(products, *(leaf.detach() for leaf in leaves)),
    }
    absent = {PYLATE: PINS}
    if find_spec("sentence_transformers") is None:
        absent[THEIRS] = "needs sentence-transformers, which is not installed"
    else:
        runs[THEIRS] = partial(theirs, leaves, lengths.tolist(), upstream)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = ours(doubles, starts, upstream.double(), backend="torch")
    return Candidates(runs, near(exact, TOLERANCE, [PRODUCTS]), absent)


def ours(
    leaves: list[Tensor], starts: Tensor, upstream: Tensor, backend: str | None = None
) -> list[Tensor]:
    """Return the scores and the gradients of both sides."""
    queries, documents = leaves
    scores = ops.maxsim(queries, documents, starts, starts, backend=backend)
    return [scores.detach(), *torch.autograd.grad(scores, leaves, upstream)]


def theirs(leaves: list[Tensor], lengths: list[int], upstream: Tensor) -> list[Tensor]:
    """The same by sentence-transformers' function, MaxSim over the number of query vectors."""
    from sentence_transformers.util.similarity import maxsim

    lists = [list(leaf.split(lengths)) for leaf in leaves]
    scores = maxsim(*lists, length_normalize=True)
    return [scores.detach(), *torch.autograd.grad(scores, leaves, upstream)]


def products(q: Tensor, p: Tensor) -> list[Tensor]:
    """Multiply in the tiles of our op, twice, and keep one number of each."""
    total = q.new_zeros(())
    for _ in range(2):
        for rows in q.split(2048):
            for columns in p.split(2048):
                total += multiply(rows, columns.t())[0, 0]
    return [total]
