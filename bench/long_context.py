"""Texts of 8,192 tokens through mixtures made of long-context encoders: padded and packed.

    python -m bench.long_context modernbert --lengths 8192,4096,2048,1024

Layers have the size of the real models (768 wide, 12 heads) and random weights; there are three,
ModernBERT's one global and two local ones, so that a whole model takes a multiple of the time. In
"padded" the attention is transformers' default (SDPA), in "packed" ours
(``attn_implementation="moe_fast"``). Both run in turn in one process, after their outputs have been
compared. Memory is measured in a process for each: how far its peak rises above what is in use
before the forward pass, as in :mod:`bench.peak_memory`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import moe_fast
from moe_fast.layers import ATTENTION

from .cases import near
from .harness import Result, race
from .peak_memory import peak_bytes

EXPERTS, VOCABULARY, PAD = 8, 1000, 0
WHO = ("padded", "packed")
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
SIZES = {
    "vocab_size": VOCABULARY,
    "num_attention_heads": 12,
    "pad_token_id": PAD,
}
# The stem of the classes, and the width of the MLP; gated but jina's.
ENCODERS = {
    "modernbert": ("ModernBert", 1152),
    "nomic_bert": ("NomicBert", 3072),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", 3072),
    "eurobert": ("EuroBert", 3072),
}


@dataclass(frozen=True)
class Job:
    """One encoder and one batch.

    Attributes:
        encoder: of ``ENCODERS``.
        lengths: tokens of each text; the longest is also the number of positions.
        layers, width: of the encoder; ``width`` a multiple of the 12 heads.
        dtype: of ``TOLERANCES``.
    """

    encoder: str
    lengths: tuple[int, ...]
    layers: int
    width: int
    dtype: str

    def words(self) -> list[str]:
        """The job as arguments of this program."""
        words = [self.encoder, "--lengths", ",".join(map(str, self.lengths))]
        words += ["--layers", str(self.layers), "--width", str(self.width)]
        return [*words, "--dtype", self.dtype]


def model_of(job: Job, who: str) -> Any:
    """Make a random mixture whose attention is that of ``who``, one of ``WHO``; else the same."""
    stem, intermediate = ENCODERS[job.encoder]
    ids = dict.fromkeys(("bos_token_id", "cls_token_id"), 1)
    ids |= dict.fromkeys(("eos_token_id", "sep_token_id", "mask_token_id"), 2)
    config = getattr(transformers, f"{stem}Config")(
        **SIZES,
        **ids,
        hidden_size=job.width,
        num_hidden_layers=job.layers,
        intermediate_size=intermediate * job.width // 768,
        max_position_embeddings=max(job.lengths),
    )
    torch.manual_seed(0)
    dense = getattr(transformers, f"{stem}Model")(config).to(getattr(torch, job.dtype)).eval()
    moe = moe_fast.upcycle(dense, num_experts=EXPERTS)
    if who == "packed":
        moe.set_attn_implementation(ATTENTION)
    return moe.requires_grad_(False)


def batch_of(lengths: Sequence[int]) -> dict[str, Tensor]:
    """Random texts of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}


def call(model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Return a function that computes the states of the real tokens."""
    real = batch["attention_mask"].bool()

    @torch.inference_mode()
    def run() -> Tensor:
        return model(**batch).last_hidden_state[real]

    return run


def times(job: Job, rounds: int) -> dict[str, Result]:
    """Compare the two, then time them in turn; results by name.

    Raises:
        WrongResult: they compute something different.
    """
    batch = batch_of(job.lengths)
    runs = {who: call(model_of(job, who), batch) for who in WHO}
    near([runs["padded"]()], TOLERANCES[job.dtype])({"packed": [runs["packed"]()]})
    results = race(runs, baseline=WHO[0], rounds=rounds, warmup=0, min_sample_seconds=0)
    return {result.name: result for result in results}


def peak(job: Job, who: str) -> int:
    """Return the bytes that one forward pass takes, in a new process (Linux alone).

    Raises:
        RuntimeError: the process failed; the message holds its standard error.
    """
    command = [sys.executable, "-m", __spec__.name, *job.words(), "--peak", who]
    path = os.pathsep.join(sys.path)  # this package, wherever it was found
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the measuring process for {who} failed:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table: seconds, their ratio, and memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoders", nargs="*", help=f"of {', '.join(ENCODERS)} (default: all)")
    parser.add_argument("--lengths", default="8192", help="tokens of each text of the batch")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=WHO, help="print the bytes that this one takes, alone")
    given = parser.parse_args(argv)
    names = given.encoders or list(ENCODERS)
    if unknown := [name for name in names if name not in ENCODERS]:
        parser.error(f"encoders must be of {', '.join(ENCODERS)}; got {', '.join(unknown)}")
    lengths = tuple(int(length) for length in given.lengths.split(","))
    jobs = [Job(name, lengths, given.layers, given.width, given.dtype) for name in names]
    if given.peak:
        model = model_of(jobs[0], given.peak)
        call(model, batch_of([min(64, max(lengths))]))()  # loads the libraries
        print(peak_bytes(call(model, batch_of(lengths))))
        return 0
    threads = f"{torch.get_num_threads()} threads"
    print(f"{threads}, {given.layers} layers of {given.width}, texts of {lengths}, {given.dtype}")
    print("| encoder | padded, s | packed, s | ratio | padded, MiB | packed, MiB |")
    print("|---|---|---|---|---|---|")
    for job in jobs:
        results = times(job, given.rounds)
        seconds = [results[who].seconds.shown(2) for who in WHO]
        mebibytes = [f"{peak(job, who) / 2**20:.0f}" for who in WHO]
        cells = [job.encoder, *seconds, results["packed"].ratio.shown(2), *mebibytes]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
