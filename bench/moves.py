"""Counts how often encoding, and a training step with a gradient cache, move between files.

A move is a call from a function in one file of moe_fast to a function in another one, regardless of
other libraries in between. Moves are what a reader has to follow, and a part of a call's overhead.
The model is a mixture made from all-MiniLM-L6-v2 (six layers, E = 4), with 16 short texts. Nothing
is timed; the numbers are the same on every machine with the compiled library:

    python -m bench.moves
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch

import moe_fast
from moe_fast.losses import CachedLoss, InfoNCELoss

from .embedding import pretrained

PACKAGE = f"{Path(moe_fast.__file__).parent}/"
TEXTS, EXPERTS = 16, 4


class Moves(NamedTuple):
    """The files that ran, and how often a function in one called a function in another."""

    files: set[str]
    calls: Counter[tuple[str, str]]


def count_moves(function: Callable[[], Any]) -> Moves:
    """Run ``function`` and count the moves of this thread."""
    moves, stack = Moves(set(), Counter()), [""]

    def see(frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE):
            return
        if event == "return":
            stack.pop()
        elif event == "call":
            moves.files.add(file)
            if stack[-1] not in ("", file):
                moves.calls[stack[-1], file] += 1
            stack.append(file)

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return moves


def jobs(routing: str) -> dict[str, Callable[[], Any]]:
    """Prepare the jobs: encoding texts, and a step of a cached loss with one chunk per column."""
    domains = [f"d{i}" for i in range(EXPERTS)] if routing == "enforced" else None
    model = moe_fast.upcycle(pretrained(), num_experts=EXPERTS, routing=routing, domains=domains)
    words = random.Random(0)
    texts = [" ".join(words.choices(["law", "cell", "river"], k=8)) for _ in range(TEXTS)]
    columns = [model.preprocess(half) for half in (texts, texts[::-1])]
    for column in columns if domains else ():
        column["expert_ids"] = torch.zeros(TEXTS, dtype=torch.long)
    loss = CachedLoss(InfoNCELoss(model), tokens_per_chunk=512)
    return {
        "encode": lambda: model.eval().encode(texts, domain=domains[0] if domains else None),
        "cached step": lambda: (model.train(), loss([{**c} for c in columns], None).backward()),
    }


def main() -> None:
    """Print the counts, and the ten most frequent moves of each job."""
    for routing in ("token_topk", "enforced"):
        for name, job in jobs(routing).items():
            job()  # work that is done only once is not counted
            moves = count_moves(job)
            print(f"{name}, {routing}: {len(moves.files)} files, {moves.calls.total()} moves")
            for (start, end), times in moves.calls.most_common(10):
                print(f"  {times:4d}  {start.removeprefix(PACKAGE)} -> {end.removeprefix(PACKAGE)}")


if __name__ == "__main__":
    main()
