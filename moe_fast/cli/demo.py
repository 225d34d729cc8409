"""``moe-fast demo``."""

from __future__ import annotations

from pathlib import Path

from moe_fast.cli.command import Run
from moe_fast.demo.__main__ import Device, Output, Quick, TrainPairs

EXAMPLE = "moe-fast demo --quick --output demo-output"


def run_command(
    *,
    quick: Quick = False,
    output: Output = Path("demo-output"),
    train_pairs: TrainPairs = None,
    device: Device = "cpu",
    run: Run,
) -> None:
    """Train and compare a dense model and two mixtures on documentation, offline."""
    from moe_fast.demo import __main__ as demo

    demo.main(quick, output, train_pairs, run.seed, device)
