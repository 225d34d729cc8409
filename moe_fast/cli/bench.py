"""``moe-fast bench``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import MOST_THREADS, Overwrite

EXAMPLE = "moe-fast bench plan --size tiny --processes 1 -o bench.json"
_CHECKOUT = Path(__file__).resolve().parent.parent.parent


def run_command(
    operations: Annotated[
        list[str] | None,
        typer.Argument(
            help="Operations to measure: route, plan, rows, expert_mlp, privacy_filter, moe_mlp, "
            "info_nce, training_step, growth, peak_memory; by default all of these. Or whole jobs, "
            "which take long: embedding, natural_step, cached_step, import_time."
        ),
    ] = None,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write the measurements to, .json.")
    ] = Path("moe-fast-bench.json"),
    size: Annotated[
        Literal["tiny", "quick", "default", "full"],
        typer.Option(help="How many sizes to measure; tiny only shows that everything runs."),
    ] = "quick",
    processes: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of new processes to measure in, one after another; 1: only this process.",
        ),
    ] = 3,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds for each comparison in each process; at least five rounds are done.",
        ),
    ] = 0.4,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_THREADS, help="Number of PyTorch's threads; by default PyTorch's own."
        ),
    ] = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Measure moe_fast on this machine against alternatives, and show the ratios of the times."""
    from moe_fast.files import check_output

    check_output(output, overwrite)
    bench = _bench()
    unknown = sorted(set(operations or ()) - set(bench.OPERATIONS))
    if unknown:
        allowed = ", ".join(bench.OPERATIONS)
        raise typer.BadParameter(f"operations must be of {allowed}; got {', '.join(unknown)}")
    arguments = [*(operations or ()), "--json", str(output), "--size", size]
    arguments += ["--processes", str(processes), "--seconds", str(seconds)]
    arguments += ["--threads", str(threads)] if threads is not None else []
    run.save_settings(output)
    raise typer.Exit(bench.main(arguments))


def _bench() -> ModuleType:
    """Import ``bench``, which is beside the package in a checkout, and in it when installed."""
    if (_CHECKOUT / "bench" / "harness.py").is_file():
        if str(_CHECKOUT) not in sys.path:
            sys.path.append(str(_CHECKOUT))
        return import_module("bench.__main__")
    return import_module("moe_fast.bench.__main__")
