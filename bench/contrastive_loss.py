"""The contrastive loss, forward and backward, against sentence-transformers': time and memory.

Symmetric, scale 20, fp32, gradients of both sides; embeddings come out of nowhere, so that the loss
alone is measured.

- ``MNRL``: ``MultipleNegativesRankingLoss`` with ``directions=("query_to_doc", "doc_to_query")``
  and ``partition_mode="per_direction"``.
- ``cached``: ``CachedMultipleNegativesRankingLoss``, its loss half, at the default chunk (32 rows)
  and at others; the fastest of these is its best.
- ``floor``: the four products of tiles that :mod:`moe_fast.ops.info_nce.tiled` makes, alone.

Losses and gradients are compared before any timing. Memory is the peak of a fresh process, less its
inputs and gradients and less the peak of the same process at B = 256.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fast import ops
from moe_fast.ops.cpu_matmul import add_product, multiply
from moe_fast.ops.info_nce.tiles import tile_size

from .harness import Result, compare, environment, table, write_json

SCALE = 20.0
DEFAULT_CHUNK = 32
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
OURS = "moe_fast"
# What a figure must reach, by candidate: the time of the other over ours, at least.
SPEED_TARGETS = {"MNRL": 1.5, "cached, default": 4.0, "cached, best": 1.4}
MEMORY_TARGETS = {8192: 96, 65536: 256}  # B: MiB at d = 384
LARGE_TARGET = 1.3  # over the same products as tiles of 8192 x 8192


def embeddings(batch: int, dim: int) -> tuple[Tensor, Tensor]:
    """Pairs that belong together somewhat, as in training."""
    torch.manual_seed(0)
    a = torch.randn(batch, dim)
    b = a + 2 * torch.randn(batch, dim)
    return a.requires_grad_(), b.requires_grad_()


def ours(a: Tensor, b: Tensor) -> Tensor:
    """The loss of moe_fast, gradients added."""
    loss = ops.info_nce(a, b, scale=SCALE)
    assert isinstance(loss, Tensor)  # no statistics
    loss.backward()
    return loss.detach()


def mnrl(a: Tensor, b: Tensor) -> Tensor:
    """sentence-transformers' loss, gradients added."""
    from sentence_transformers.sentence_transformer import losses

    peer = losses.MultipleNegativesRankingLoss(None, scale=SCALE, **SYMMETRIC)
    loss = peer.compute_loss_from_embeddings([a, b], None)
    loss.backward()
    return loss.detach()


def cached(chunk: int, a: Tensor, b: Tensor) -> Tensor:
    """The loss half of sentence-transformers' cached loss, gradients added."""
    from sentence_transformers.sentence_transformer import losses

    no_encoder = torch.nn.Sequential(torch.nn.Identity())
    peer = losses.CachedMultipleNegativesRankingLoss(
        no_encoder, scale=SCALE, mini_batch_size=chunk, **SYMMETRIC
    )
    return peer.calculate_loss([[a], [b]], with_backward=True).detach()


def products(size: int, a: Tensor, b: Tensor) -> None:
    """The loss's four products over all tiles of ``size`` rows and columns, and nothing else."""
    with torch.no_grad():
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
        for q, dq in zip(a.split(size), grad_a.split(size), strict=True):
            for k, dk in zip(b.split(size), grad_b.split(size), strict=True):
                multiply(q, k.t())  # the forward's
                s = multiply(q, k.t())
                add_product(dq, s, k)
                add_product(dk, s.t(), q)


def measured(run: Callable[[Tensor, Tensor], Any], a: Tensor, b: Tensor) -> Callable[[], list]:
    """A call that gives the loss and both gradients."""

    def call() -> list:
        a.grad = b.grad = None
        return [run(a, b), a.grad, b.grad]

    return call


def check(outputs: dict[str, list]) -> None:
    """Raise unless every loss and gradient is near ours, in relative L2 norm; not the floor's."""
    for name, values in outputs.items():
        for position, (value, expected) in enumerate(zip(values, outputs[OURS], strict=True)):
            if name == "floor":
                continue
            error = ((value - expected).norm() / expected.norm()).item()
            if not error <= 1e-4:
                raise AssertionError(f"{name}, output {position}: differs by {error:.1e}.")


def speed(batch: int, dim: int, chunks: Sequence[int], rounds: int) -> list[Result]:
    """Everything over ours, the baseline."""
    a, b = embeddings(batch, dim)
    runs: dict[str, Callable] = {
        OURS: ours,
        "floor": partial(products, tile_size(a.device)),
        "MNRL": mnrl,
    }
    runs |= {f"cached, {chunk}": partial(cached, chunk) for chunk in chunks}
    candidates = {name: measured(run, a, b) for name, run in runs.items()}
    return compare(candidates, baseline=OURS, check=check, rounds=rounds, warmup=1)


def speed_verdicts(results: list[Result]) -> list[str]:
    """Each ratio beside its target."""
    ratios = {result.name: result.ratio.median for result in results}
    by_chunk = {name: ratio for name, ratio in ratios.items() if name.startswith("cached, ")}
    found = {
        "MNRL": ratios["MNRL"],
        "cached, default": ratios[f"cached, {DEFAULT_CHUNK}"],
        "cached, best": min(by_chunk.values()),
    }
    lines = [f"moe_fast takes {1 / ratios['floor']:.2f} of the floor's time"]
    for name, target in SPEED_TARGETS.items():
        met = "met" if found[name] >= target else "MISSED"
        lines.append(f"{name}: {found[name]:.2f} times as long, target {target}: {met}")
    return lines


_CHILD = """
import torch
from bench.contrastive_loss import embeddings, {run} as run
a, b = embeddings({batch}, {dim})
run({arguments}a, b)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak_mib(run: str, batch: int, dim: int) -> float:
    """MiB at the peak of a fresh process that does ``run`` once, less inputs and gradients."""
    arguments = f"{DEFAULT_CHUNK}, " if run == "cached" else ""
    code = _CHILD.format(run=run, batch=batch, dim=dim, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    if done.returncode:
        raise RuntimeError(f"{run} at B = {batch} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout) / 1024 - 4 * batch * dim * 4 / 2**20


def memory(run: str, batch: int, dim: int) -> float:
    """MiB that B rows need beyond inputs, gradients and what 256 rows need."""
    return peak_mib(run, batch, dim) - peak_mib(run, 256, dim)


def large(batch: int, dim: int) -> dict[str, float]:
    """Seconds of one forward and backward, and of its products in tiles of 8192, in turn."""
    a, b = embeddings(batch, dim)
    runs: dict[str, Callable] = {"products": partial(products, 8192), OURS: ours}
    seconds = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run(a, b)
        seconds[name] = time.perf_counter() - start
    if a.grad is None or not (a.grad.isfinite().all() and a.grad.norm() > 0):
        raise AssertionError("the gradient at the large batch is not finite, or is zero.")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print figures beside their targets, write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--chunks", type=int, nargs="+", default=[32, 128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-batches", type=int, nargs="*", default=[8192])
    parser.add_argument("--memory-dim", type=int, default=384)
    parser.add_argument("--large", type=int, help="one repetition at this batch (65536: minutes)")
    parser.add_argument("--json", help="write the record to this file")
    given = parser.parse_args(argv)

    results = speed(given.batch, given.dim, sorted({DEFAULT_CHUNK, *given.chunks}), given.rounds)
    verdicts = speed_verdicts(results)
    print(table(results, f"symmetric loss, forward + backward, B={given.batch} d={given.dim}"))
    print(*verdicts, sep="\n", end="\n\n")
    record: dict[str, Any] = {
        "environment": environment(),
        "speed": {"batch": given.batch, "dim": given.dim, "results": results},
        "verdicts": verdicts,
        "memory_mib": {},
    }
    for batch in given.memory_batches:
        peers = ("ours", "mnrl", "cached") if batch <= 8192 else ("ours",)
        figures = {run: memory(run, batch, given.memory_dim) for run in peers}
        record["memory_mib"][batch] = figures
        target = MEMORY_TARGETS.get(batch, max(MEMORY_TARGETS.values()))
        met = "met" if figures["ours"] <= target else "MISSED"
        text = ", ".join(f"{run} {mib:.0f}" for run, mib in figures.items())
        print(f"extra MiB at B={batch}: {text}; target {target}: {met}")
    if given.large:
        seconds = large(given.large, given.memory_dim)
        ratio = seconds[OURS] / seconds["products"]
        met = "met" if ratio <= LARGE_TARGET else "MISSED"
        print(f"B={given.large}: {seconds[OURS]:.1f} s, {ratio:.2f} of its products' "
              f"{seconds['products']:.1f} s, target {LARGE_TARGET}: {met}")  # fmt: skip
        record["large"] = {"batch": given.large, "seconds": seconds}
    if given.json:
        write_json(given.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
