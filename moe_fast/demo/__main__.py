"""``python -m moe_fast.demo``: turn a dense BERT into experts, train, measure, search."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_fast.demo.pretrained import go_offline, pretrained_folder
from moe_fast.version import install_command

TRAIN_PAIRS, HELD_OUT_PAIRS = 2950, 1000
QUICK_TRAIN_PAIRS, QUICK_HELD_OUT_PAIRS = 250, 150

Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help=f"Take {QUICK_TRAIN_PAIRS} training and {QUICK_HELD_OUT_PAIRS} held-out pairs: under "
        "three minutes, and numbers that mean little.",
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", help="Folder to write the table, the numbers and the pictures to."
    ),
]
TrainPairs = Annotated[
    int | None,
    typer.Option(
        min=5,  # one per domain
        help=f"Number of training pairs of each variant; by default {TRAIN_PAIRS}, with --quick "
        f"{QUICK_TRAIN_PAIRS}.",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute, as PyTorch names it: cpu, cuda ...")]


def main(
    quick: Quick = False,
    output: Output = Path("demo-output"),
    train_pairs: TrainPairs = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
    device: Device = "cpu",
) -> None:
    """Fine-tune a dense model and two mixtures of experts, offline, and measure them.

    They learn from the documentation of five installed packages, and are measured on held-out pairs
    of it.
    """
    go_offline()
    try:
        folder = pretrained_folder()
        from moe_fast.demo.run import run_demo  # needs the extras that the message below names
    except ImportError as error:
        print(error, file=sys.stderr)
        if "pip install" not in str(error):
            print(f"The demo needs: {install_command('demo')}", file=sys.stderr)
        raise typer.Exit(1) from error
    run_demo(
        folder,
        output,
        train_pairs=train_pairs or (QUICK_TRAIN_PAIRS if quick else TRAIN_PAIRS),
        held_out_pairs=QUICK_HELD_OUT_PAIRS if quick else HELD_OUT_PAIRS,
        seed=seed,
        device=device,
    )


if __name__ == "__main__":
    typer.run(main)
