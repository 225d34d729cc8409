"""``python -m moe_fast.demo``: turn a dense BERT into experts, train, measure, search."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from moe_fast.demo.pretrained import go_offline, pretrained_folder
from moe_fast.version import install_command

TRAIN_PAIRS, HELD_OUT_PAIRS = 2950, 1000
QUICK_TRAIN_PAIRS, QUICK_HELD_OUT_PAIRS = 250, 150


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m moe_fast.demo",
        description="Fine-tunes a dense model and two mixtures of experts on the documentation of "
        "five installed packages, offline, and measures them on held-out pairs.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_TRAIN_PAIRS} training and {QUICK_HELD_OUT_PAIRS} held-out pairs: under three "
        "minutes, numbers too small to mean much",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-output"), help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--train-pairs",
        type=_pair_count,
        help=f"of each variant ({TRAIN_PAIRS}; with --quick {QUICK_TRAIN_PAIRS})",
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="(%(default)s)")
    given = parser.parse_args(arguments)
    given.train_pairs = given.train_pairs or (QUICK_TRAIN_PAIRS if given.quick else TRAIN_PAIRS)
    given.held_out_pairs = QUICK_HELD_OUT_PAIRS if given.quick else HELD_OUT_PAIRS
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when it ran, 1 when something it needs is missing."""
    given = parse_arguments(arguments)
    go_offline()
    try:
        folder = pretrained_folder()
        from moe_fast.demo.run import run_demo  # needs the extras that the message below names
    except ImportError as error:
        print(error, file=sys.stderr)
        if "pip install" not in str(error):
            print(f"The demo needs: {install_command('demo')}", file=sys.stderr)
        return 1
    run_demo(
        folder,
        given.output,
        train_pairs=given.train_pairs,
        held_out_pairs=given.held_out_pairs,
        seed=given.seed,
        device=given.device,
    )
    return 0


def _pair_count(text: str) -> int:
    value = int(text)
    if value < 5:
        raise argparse.ArgumentTypeError(f"must be at least 5, one per domain; got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
