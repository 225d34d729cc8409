"""Everything about the Triton kernels that needs a GPU.

    python -m bench.gpu --out FOLDER [PART ...]    all parts or those that are named, in this order
    python -m bench.gpu --out FOLDER --rehearse    what needs no GPU: the kernels are compiled
    python -m bench.gpu --out FOLDER --dry-run     on the CPU, interpreted, at tiny shapes

``docs/kernels.md`` has the three calls that measure everything, each in less than ten minutes and
of use without the others. The parts, the most valuable first:

- ``precompile``: compiles what the other parts of the call will launch, in 16 processes.
- ``kernels``: each product alone; milliseconds, share of the floor, registers and spills.
- ``step``: forward + backward beside a loop of cuBLAS calls.
- ``cuda``: the tests of the CUDA kernels of the native library.
- ``correct``: errors against float64 on a grid of shapes, until its time is over.
- ``properties``: nothing synchronises; CUDA graphs capture; repeats agree bitwise; offsets beyond
  2^31; bytes saved for the backward pass.
- ``sanitize``, ``profile``: ten tiny cases under compute-sanitizer; ncu's metrics of six products.
- ``tune``: searches tile sizes; the table is in FOLDER/tuning, and in the record.
- ``tuned``: ``kernels`` and ``step`` again, with that table.
- ``info_nce``: errors, repeats, time and memory of the contrastive loss.
- ``sweep``: the share of the floor over numbers of tokens and widths.
- ``others``: transformers' experts, a compiled dense MLP, 12 layers with enforced routing.

All output is in FOLDER. The record, FOLDER/record.json, is written after every measurement.
``--resume FILE`` takes over what an earlier record has, the tuned table included. No measurement
begins after ``--deadline`` seconds; one that does not end is cut off 15 s later.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .gpu_compile import COMPILED, counting_compilations
from .gpu_record import LEFT_OUT, Results, made, process_age, read_parts
from .harness import ROOT, environment

TABLES = "MOE_FAST_TUNING"


class Run:
    """One call of the program: its arguments, its record, and what the parts share."""

    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        from .gpu_times import Settings

        self.arguments, self.results = arguments, results
        self.dry, self.out = arguments.dry_run, Path(arguments.out)
        self.device = torch.device("cpu") if self.dry else torch.device("cuda", 0)
        self.settings = Settings(self.device, 1 if self.dry else arguments.rounds, self.dry)
        self._part = ""

    def begin(self, part: str) -> None:
        """What follows belongs to ``part``."""
        self._part = part

    def measure(self, name: str, run: Callable[[], Any], least: float = 0.0) -> Any:
        """:meth:`Results.measure` in the part that has begun; then free the graphs' memory."""
        value = self.results.measure(self._part, name, run, least)
        if not self.dry:
            torch.cuda.empty_cache()
        return value

    def note(self, name: str, value: Any) -> None:
        """:meth:`Results.note` in the part that has begun."""
        self.results.note(self._part, name, value)

    def left(self, most: float = math.inf) -> float:
        """Seconds for something that can take long: ``most``, or fewer if the deadline is near."""
        return min(most, self.results.left())

    def ceilings(self) -> Any:
        """The limits of this GPU, measured once for a record."""
        from .gpu_times import BASE, Ceilings, ceilings

        found = self.results.parts.get("ceilings", {}).get("bfloat16")
        if found is None or not made(found):
            found = vars(ceilings(self.settings, BASE.dtype))
            self.results.note("ceilings", "bfloat16", found)
        return Ceilings(**found)


# --- the parts -----------------------------------------------------------------------------------


def precompile(run: Run) -> None:
    """Compile in a process of its own: this one must not fork after CUDA is in use."""
    a = run.arguments
    path = run.out / COMPILED
    gpu, capability, multiprocessors = a.rehearse_gpu, a.rehearse_capability, 132
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        gpu, capability = torch.cuda.get_device_name(), 10 * major + minor
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    command = [sys.executable, "-m", "bench.gpu_compile", *a.parts, "--json", str(path)]
    command += ["--gpu", gpu, "--capability", str(capability), "--every", str(a.every)]
    command += ["--multiprocessors", str(multiprocessors), "--processes", str(a.processes)]
    seconds = run.left(a.compile_seconds)

    def compile_all() -> dict[str, Any]:
        limited = [*command, "--seconds", str(seconds)] if seconds < math.inf else command
        limit = None if seconds == math.inf else seconds + 60  # collecting comes before
        done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        found: dict[str, Any] = {"summary": done.stdout.strip()[-500:], "details": path.name}
        return found | ({"failures": done.stderr.splitlines()[-20:]} if done.returncode else {})

    run.measure("compiled", compile_all)


def kernels(run: Run) -> None:
    """Each product alone, then the times of all kernels of a step in their order."""
    from . import gpu_kernels as k
    from .gpu_times import BASE, DRY

    shape = DRY if run.dry else BASE
    ceilings = run.ceilings()
    for piece in k.pieces(shape, run.device):
        run.measure(piece.name, partial(k.measure, piece, run.settings, ceilings))
    if not run.dry:
        run.measure("kernels of a step", partial(k.step_times, shape, run.settings))


def step(run: Run) -> None:
    """Forward + backward, and forward alone, beside the loop of cuBLAS calls."""
    from . import gpu_times as t

    ceilings = run.ceilings()
    for name, shape in t.step_shapes(run.dry).items():
        for backward, direction in ((True, "forward + backward"), (False, "forward")):
            compare = partial(t.against_cublas, shape, backward, run.settings)
            run.measure(f"{direction}, {name}", compare)
            least = 1e3 * t.floor(shape, ceilings, backward)
            run.note(f"floor of {direction}, {name}", {"ms": least})


def cuda(run: Run) -> None:
    """The CUDA half of the native library."""
    from .gpu_tools import cuda_tests

    run.measure("tests", lambda: cuda_tests(run.left(180), run.out))


def correct(run: Run) -> None:
    """Errors on the grids; what was found so far is recorded after every case."""
    from . import gpu_checks as checks

    for name, (cases, share) in checks.grids(run.dry).items():
        _on_grid(run, name, cases, checks.CHECKS[name], share)


def _on_grid(run: Run, name: str, cases: Any, check: Callable, share: float) -> None:
    from .gpu_checks import check_grid

    def measure() -> dict[str, Any]:
        seconds = run.left(share * run.arguments.check_seconds)
        return check_grid(cases, check, run.device, seconds, partial(run.note, name))

    run.measure(name, measure)


def properties(run: Run) -> None:
    """What only a whole layer shows."""
    from . import gpu_checks as checks
    from .gpu_times import BASE, DRY

    base = DRY if run.dry else BASE
    if not run.dry:
        run.measure("synchronisation", lambda: checks.check_no_sync(base, run.device))
        run.measure("graph", lambda: checks.check_graph(base, run.device))
    run.measure("repeats", lambda: checks.check_repeats(base, run.device))
    run.measure("saved bytes", lambda: checks.saved_bytes(base, run.device))
    if not run.dry:
        run.measure("far offsets", lambda: checks.check_far_offsets(checks.FAR, run.device), 20)


def sanitize(run: Run) -> None:
    """The tiny cases under compute-sanitizer."""
    from . import gpu_tools

    for name in gpu_tools.SANITIZERS:
        run.measure(name, partial(gpu_tools.sanitize, name, run.left(150), run.out), 30)


def profile(run: Run) -> None:
    """ncu's metrics of the products."""
    from . import gpu_tools

    for name in gpu_tools.PROFILED:
        run.measure(name, partial(gpu_tools.profile, name, run.left(60), run.out), 20)


def tune(run: Run) -> None:
    """Search tile sizes for the shapes of ``step``; the first of them gets most of the time."""
    from moe_fast.ops import tuning

    from .gpu_times import step_shapes

    shapes = step_shapes(run.dry)
    for name, case in shapes.items():
        share = 0.7 if name == "K=1" else 0.3 / (len(shapes) - 1)

        def search(case: Any = case, share: float = share) -> dict[str, Any]:
            found = tuning.tune(
                *(case.dim, case.hidden, case.experts, case.k),
                tokens=case.tokens,
                dtype=case.dtype,
                seconds=run.left(share * run.arguments.tune_seconds),
                device=run.device,
            )
            return {"choices": found.choices, "layer_ms": found.layer_ms, "kept": found.kept}

        run.measure(name, search)
        run.note("table", _table(run.out))


def tuned(run: Run) -> None:
    """The products and the step with the table that the tuner wrote."""
    if made(run.results.parts.get("tune", {}).get("table", {LEFT_OUT: ""})):
        kernels(run)
        step(run)
    else:
        run.measure(
            "table", lambda: {LEFT_OUT: "nothing was tuned: --resume a record with a table"}
        )


def info_nce(run: Run) -> None:
    """The contrastive loss."""
    from . import gpu_info_nce as contrastive
    from .problem import covering

    cases = covering(contrastive.DRY_GRID if run.dry else contrastive.GRID)
    run.measure("times", lambda: contrastive.times(run.settings, run.ceilings()))
    run.measure("repeats", lambda: contrastive.check_repeats(run.device, run.dry))
    _on_grid(run, "errors", cases, contrastive.check, 0.15)


def sweep(run: Run) -> None:
    """The share of the floor for other numbers of tokens and other widths."""
    from . import gpu_times as t

    ceilings = run.ceilings()
    for shape in t.sweep_shapes(run.dry):
        for backward, direction in ((False, "forward"), (True, "forward + backward")):
            run.measure(
                f"{direction}, {shape}",
                partial(t.of_floor, shape, backward, run.settings, ceilings),
            )


def others(run: Run) -> None:
    """Transformers' experts, a dense MLP under torch.compile, and whole stacks of layers."""
    from . import gpu_times as t

    base = t.DRY if run.dry else t.BASE
    for backward, direction in ((True, "forward + backward"), (False, "forward")):
        run.measure(
            f"{direction}, no biases",
            partial(t.against_transformers, base, backward, run.settings),
        )
        compare = partial(t.against_dense, base, backward, run.settings)
        run.measure(f"{direction}, dense", compare)
    layers = 2 if run.dry else 12
    enforced = partial(t.layers_enforced, base, run.settings, layers)
    run.measure(f"{layers} layers, enforced", enforced)


PARTS: dict[str, Callable[[Run], None]] = {
    part.__name__: part
    for part in (
        *(precompile, kernels, step, cuda, correct, properties),
        *(sanitize, profile, tune, tuned, info_nce, sweep, others),
    )
}
WITHOUT_A_GPU = ("precompile",)
INTERPRETED = ("kernels", "step", "correct", "properties", "tune", "tuned", "info_nce", "sweep",
               "others")  # fmt: skip


# --- the program ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; return 1 if something failed, 2 without a GPU."""
    begun = time.monotonic() - (process_age() if argv is None else 0.0)
    parser = _parser()
    arguments = parser.parse_args(argv)
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART must be one of {', '.join(PARTS)}; got {', '.join(unknown)}")
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, below
    elif not arguments.rehearse and not torch.cuda.is_available():
        print("bench.gpu: error: no GPU is there; --rehearse and --dry-run need none.",
              file=sys.stderr)  # fmt: skip
        return 2
    if not arguments.parts:
        arguments.parts = [p for p in PARTS if not arguments.dry_run or p in INTERPRETED]
    try:
        known = read_parts(arguments.resume) if arguments.resume else {}
        known.pop("precompile", None)  # the cache of that machine need not be here
    except ValueError as error:
        parser.error(str(error))
    out = Path(arguments.out).resolve()
    arguments.out = str(out)
    os.environ[TABLES] = str(out / "tuning")
    _restore_table(known.get("tune", {}).get("table"), out)
    head = {"environment": environment(), "command": list(sys.argv[1:] if argv is None else argv)}
    with Results(out / "record.json", head, arguments.deadline, begun, known) as results:
        run = Run(arguments, results)
        for part, measure in PARTS.items():
            if part not in arguments.parts:
                continue
            run.begin(part)
            start = time.monotonic()
            if arguments.rehearse and part not in WITHOUT_A_GPU:
                run.measure(
                    "rehearsed", lambda: {LEFT_OUT: "it needs a GPU; its kernels are compiled"}
                )
                continue
            with counting_compilations() as compiled:
                try:
                    measure(run)
                except Exception as error:  # while preparing; the other parts still run
                    run.note("prepared", {"error": f"{type(error).__name__}: {error}"})
            if compiled.kernels:  # those that precompile has missed
                results.note("compiled late", part, vars(compiled))
            print(f"== {part}: {time.monotonic() - start:.0f} s", flush=True)
        failures = results.finish()
    print(f"{results.path}: {'; '.join(failures) + ' FAILED' if failures else 'nothing failed'}")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", required=True, help="the folder of all output")
    parser.add_argument("--resume", metavar="FILE", help="take over the results of this record")
    parser.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--processes", type=int, default=16, help="that compile at a time")
    parser.add_argument("--compile-seconds", type=float, default=120.0)
    parser.add_argument("--check-seconds", type=float, default=150.0)
    parser.add_argument("--tune-seconds", type=float, default=180.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at tiny shapes")
    parser.add_argument("--rehearse", action="store_true", help="compile only; needs no GPU")
    parser.add_argument("--rehearse-gpu", default="NVIDIA H200", help="compile as for this one")
    parser.add_argument("--rehearse-capability", type=int, default=90)
    parser.add_argument("--every", type=int, default=1, help="compile one kernel of so many")
    return parser


def _table(out: Path) -> Mapping[str, str]:
    """The tuning tables in the output folder, as text by file name."""
    return {path.name: path.read_text(encoding="utf-8") for path in _tables(out)}


def _tables(out: Path) -> Iterator[Path]:
    yield from sorted((out / "tuning").glob("*.json"))


def _restore_table(table: Mapping[str, str] | None, out: Path) -> None:
    """Write the tables of an earlier record where this run looks for them."""
    for name, text in (table or {}).items():
        path = out / "tuning" / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
