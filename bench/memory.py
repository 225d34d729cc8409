"""What a layer of expert MLPs holds per row, and the most it takes, in training.

Each case is two fresh processes, of T and 2T tokens, and what the second needs more than the first:
parameters, their gradients and the threads' scratch cancel out. A process runs a small batch first,
resets the kernel's high-water mark, and reports by how much forward and backward raised its
resident memory: all of it, whoever allocated. ``held`` is what is there between the two, ``peak``
the most until the gradients are there; both without x and its gradient's buffer.

The unit is z, S * H numbers of the dtype. ``held`` should be z and the output y, D wide and a
fourth of z at K = 1 (y is the next layer's to keep or drop). The peak adds the gradient of x, as
large as y, and partial sums of D float32 numbers per row and part of H (docs/kernels-cpu.md).
Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .harness import ROOT, environment, write_json

BACKENDS = {"moe_fast": "cpp", "reference": "torch"}
SLACK = 0.1  # pages, and what the allocator keeps

_CHILD = """
import gc, json, sys, torch
from moe_fast import ops
tokens, dim, k, backend, dtype, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
dtype, hidden, experts = getattr(torch, dtype), 4 * dim, 8
up = (torch.randn(experts, hidden, dim) / dim**0.5).to(dtype).requires_grad_()
down = (torch.randn(experts, dim, hidden) / hidden**0.5).to(dtype).requires_grad_()
up.grad, down.grad = torch.zeros_like(up), torch.zeros_like(down)

def memory(field):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024

def reset():
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory("VmRSS")

def step(tokens):
    x = torch.randn(tokens, dim).to(dtype).requires_grad_()
    x.grad, upstream = torch.zeros_like(x), torch.randn(tokens, dim).to(dtype)
    plan = ops.plan(torch.rand(tokens, experts).topk(k).indices, experts)
    weights = torch.rand(tokens, k, requires_grad=True)
    before = reset()
    y = ops.expert_mlp(x, up, down, None, None, weights, plan, backend=backend)
    held = memory("VmRSS") - before
    y.backward(upstream)
    return held, memory("VmHWM") - before

step(256)
held, peak = step(tokens)
print(json.dumps({"held": held, "peak": peak, "z": tokens * k * hidden * dtype.itemsize}))
"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one case: between forward and backward, at most, and of z."""

    held: int
    peak: int
    z: int


def measure(
    tokens: int, dim: int, k: int, backend: str, dtype: str = "float32", threads: int = 2
) -> Memory:
    """Run one case in a fresh process."""
    case = json.dumps([tokens, dim, k, backend, dtype, threads])
    command = [sys.executable, "-c", _CHILD, case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the measuring process failed:\n{done.stderr}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def per_row(tokens: int, dim: int, k: int, backend: str, dtype: str) -> tuple[float, float]:
    """Held and peak in units of z, of T more tokens."""
    one, two = (measure(n * tokens, dim, k, backend, dtype) for n in (1, 2))
    z = two.z - one.z
    return (two.held - one.held) / z, (two.peak - one.peak) / z


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the verdict, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--json", help="write the record to this file")
    arguments = parser.parse_args(argv)
    record: dict[str, tuple[float, float]] = {}
    print(f"{'in units of z = S * H numbers':40s}  held   peak")
    for k in (1, 2):
        for dtype in ("float32", "bfloat16"):
            for name, backend in BACKENDS.items():
                label = f"D={arguments.dim} K={k} {dtype} {name}"
                held, peak = per_row(arguments.tokens, arguments.dim, k, backend, dtype)
                record[label] = (held, peak)
                verdict = ""
                if name == "moe_fast":
                    claim = 1 + 0.25 / k + SLACK
                    verdict = f"  held at most {claim:.2f}: {'met' if held <= claim else 'MISSED'}"
                print(f"{label:40s} {held:5.2f}  {peak:5.2f}{verdict}")
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "units_of_z": record})
    return 0


if __name__ == "__main__":
    sys.exit(main())
