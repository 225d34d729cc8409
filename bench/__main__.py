"""Measure moe_fast beside what would be used instead: ``python -m bench``, ``moe-fast bench``.

Every operation on random data, candidates in turn, outputs checked before anything is timed. Writes
one JSON file, whole after every case; ``python -m bench.report`` makes a page of such files,
``python -m bench.compare`` holds one against another.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

import torch

from moe_fast import available_backends
from moe_fast.ops import native

from .cases import SIZES, measure, show
from .harness import ROOT
from .machine import Machine, measure_machine
from .peak_memory import OPERATION
from .record import Recorder, Row

TIMED = ("route", "plan", "expert_mlp", "moe_mlp", "info_nce", "training_step", "growth")
OPERATIONS = (*TIMED, "peak_memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    machine = measure_machine(*((1, 64, 1) if arguments.size == "tiny" else ()))
    print(describe(machine), end="\n\n", flush=True)
    recorder = Recorder(
        machine,
        size=arguments.size,
        backends={op: available_backends(op) for op in ("route", "plan", "expert_mlp", "info_nce")},
        products=native.cpu_capability,
    )
    for rows in measured(arguments, machine):
        recorder.add(rows)
        recorder.write(arguments.json)
    for reason in recorder.record.noisy:
        print(f"NOISY MACHINE: {reason}. Its figures deserve doubt.")
    print(f"{arguments.json}: {len(recorder.record.rows)} rows, {time.monotonic() - start:.0f} s")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The settings of a run."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(OPERATIONS)} (default: all)")
    parser.add_argument("--size", choices=SIZES, default="default", help="how much to measure")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case, if it can")
    parser.add_argument("--threads", type=int, help="of torch; default: what torch takes")
    default = ROOT / "bench" / "results" / "local" / "bench.json"
    parser.add_argument("--json", type=Path, default=default, help="file to write the record to")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.operations) - set(OPERATIONS))
    if unknown:
        parser.error(f"operations must be of {', '.join(OPERATIONS)}; got {', '.join(unknown)}")
    if arguments.threads is not None and arguments.threads < 1:
        parser.error(f"--threads must be at least 1; got {arguments.threads}")
    arguments.operations = arguments.operations or list(OPERATIONS)
    return arguments


def measured(arguments: argparse.Namespace, machine: Machine) -> Iterator[list[Row]]:
    """The rows of one case after another, printed."""
    tiny = arguments.size == "tiny"
    for name in arguments.operations:
        module = import_module(f"{__package__}.{name}")
        if name == "peak_memory":
            yield print_memory(module.rows(arguments.size))
            continue
        for case in module.cases(arguments.size):
            rows = measure(
                case,
                machine,
                seconds=arguments.seconds,
                rounds=1 if tiny else 40,
                min_sample_seconds=0 if tiny else 0.005,
            )
            print(show(rows), end="\n\n", flush=True)
            yield rows


def print_memory(rows: list[Row]) -> list[Row]:
    """Show ``rows`` and return them."""
    print(OPERATION)
    for row in rows:
        value = row.reason if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB"
        print(f"  T={row.shape['T']:<6d} {row.who:12s} {value}")
    print(flush=True)
    return rows


def describe(machine: Machine) -> str:
    """The ceilings in one line."""
    rates = ", ".join(f"{d} {r / 1e9:.0f} GFLOP/s" for d, r in machine.matrix_rate.items())
    return (
        f"{torch.get_num_threads()} threads; copying {machine.copy_bandwidth / 1e9:.1f} GB/s, "
        f"reading {machine.read_bandwidth / 1e9:.1f} GB/s; products: {rates}; "
        f"moe_fast multiplies with {native.cpu_capability or 'torch'}"
    )


if __name__ == "__main__":
    sys.exit(main())
