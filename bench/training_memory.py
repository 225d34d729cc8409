"""Memory of training all-MiniLM-L6-v2: dense, and as an enforced mixture of five experts.

    python -m bench.training_memory --steps 5

"dense" trains by sentence-transformers' trainer and its MultipleNegativesRankingLoss, "mixture" by
``MoESentenceTransformerTrainer`` and ``InfoNCELoss``. Both see the same pairs in the same order, in
float32, with AdamW and the model's own dropout. Each runs in new processes, one per setting of
glibc's malloc: "default", and "mapped", which maps each block above 64 KiB separately. A freed
block then leaves the process at once, so that the peak is that of the memory in use.

The pairs are those of the file that ``MOE_FAST_BENCH_DATA`` names, or random words (see
:mod:`bench.embedding`). Only Linux with glibc can be measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

import moe_fast

from .embedding import read_pairs
from .peak_memory import status

WHO = ("dense", "mixture")
MALLOCS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "mapped": {"MALLOC_MMAP_THRESHOLD_": "65536"},
}
EXPERTS = 5


class Watch(TrainerCallback):
    """Reads the process's size and the tensors' sizes while a trainer runs.

    Attributes:
        sizes: bytes; "gradients" and "Adam" at the last optimizer step.
        resident: the process's bytes after each step.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.resident: list[int] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Count while the gradients still exist."""
        gradients = [p.grad for p in given["model"].parameters() if p.grad is not None]
        self.sizes["gradients"] = bytes_of(gradients)
        adam = given["optimizer"].state.values()
        self.sizes["Adam"] = bytes_of(t for s in adam for t in s.values())

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note the size of the process."""
        self.resident.append(status("VmRSS"))


class _MallocInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def free_in_malloc() -> int:
    """Return the bytes that were freed but that malloc keeps in its heaps, mapped or not."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _MallocInfo
    return int(libc.mallinfo2().fordblks)


def bytes_of(tensors: Iterable[Any]) -> int:
    """Sum the sizes of different storages; what is not a tensor is skipped."""
    storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def trainer_of(
    who: str, folder: str, pairs: Sequence[tuple[str, str]], job: argparse.Namespace, watch: Watch
) -> Any:
    """Make the trainer of ``who``; its model is read from ``job.model``, its output ``folder``."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    from moe_fast.losses import InfoNCELoss
    from moe_fast.training import MoESentenceTransformerTrainer, TrimMemoryCallback

    model: Any = SentenceTransformer(job.model, device="cpu")
    model.max_seq_length = job.tokens
    columns: dict[str, Any] = {"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]}
    make: Any = SentenceTransformerTrainer
    if who == "mixture":
        domains = [f"domain {n}" for n in range(EXPERTS)]
        model = moe_fast.upcycle(model, num_experts=EXPERTS, routing="enforced", domains=domains)
        columns["domain"] = [domains[n % EXPERTS] for n in range(len(pairs))]
        make = MoESentenceTransformerTrainer
    loss = InfoNCELoss if who == "mixture" else losses.MultipleNegativesRankingLoss
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        max_steps=job.steps,
        per_device_train_batch_size=job.batch,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return make(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        loss=loss(model),
        callbacks=[watch, *([TrimMemoryCallback()] if job.trim else [])],
    )


def saved_bytes(trainer: Any) -> int:
    """Count what one forward pass keeps for the backward pass, without parameters."""
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return tensor

    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, inputs)
    found = bytes_of(t for t in kept if t.untyped_storage().data_ptr() not in own)
    del loss
    return found


def measure(who: str, job: argparse.Namespace) -> dict[str, Any]:
    """Train in this process, and return bytes by name.

    "peak" and "resident" are of the whole process, "built" is its size before the first step,
    "free" what malloc kept after the last one, "trimmed" the size after ``malloc_trim``.
    """
    from moe_fast.demo.pretrained import go_offline

    go_offline()
    torch.manual_seed(0)
    pairs = read_pairs(job.steps * job.batch)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(who, folder, pairs, job, watch)
        gc.collect()
        found: dict[str, Any] = {"built": status("VmRSS")}
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        trainer.train()
        found |= watch.sizes | {"weights": bytes_of(trainer.model.parameters())}
        found |= {"peak": status("VmHWM"), "after each step": watch.resident}
        found |= {"resident": watch.resident[-1], "free": free_in_malloc()}
        ctypes.CDLL(None).malloc_trim(0)
        found["trimmed"] = status("VmRSS")
        found["saved"] = saved_bytes(trainer)
    return found


def in_fresh_process(who: str, malloc: str, words: Sequence[str]) -> dict[str, Any]:
    """Return what :func:`measure` finds in a new process with this setting of malloc.

    Raises:
        RuntimeError: the process failed; the message holds its standard error.
    """
    command = [sys.executable, "-m", "bench.training_memory", *words, "--alone", who]
    path = os.pathsep.join(sys.path)  # this package, wherever it was found
    environment = {**os.environ, "PYTHONPATH": path, **MALLOCS[malloc]}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the measuring process for {who} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


COLUMNS = (
    *("peak", "resident", "free", "trimmed", "built"),
    *("weights", "gradients", "Adam", "saved"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table in MB."""
    from moe_fast.demo.pretrained import pretrained_folder

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="folder of a sentence-transformers model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32, help="pairs per step")
    parser.add_argument("--tokens", type=int, default=256, help="the longest text")
    parser.add_argument("--trim", action="store_true", help="trim malloc after each step")
    parser.add_argument("--mallocs", default=",".join(MALLOCS))
    parser.add_argument("--alone", choices=WHO, help="measure this one here, and print JSON")
    words = list(sys.argv[1:] if argv is None else argv)
    job = parser.parse_args(words)
    job.model = job.model or str(pretrained_folder())
    if job.alone:
        print(json.dumps(measure(job.alone, job)))
        return 0
    print(f"{job.batch} pairs of at most {job.tokens} tokens, {job.steps} steps; MB")
    print(f"| malloc | model | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    for malloc in job.mallocs.split(","):
        for who in WHO:
            found = in_fresh_process(who, malloc, words)
            cells = [f"{found[name] / 1e6:.0f}" for name in COLUMNS]
            print(f"| {' | '.join([malloc, who, *cells])} |", flush=True)
            print([round(n / 1e6) for n in found["after each step"]], file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
