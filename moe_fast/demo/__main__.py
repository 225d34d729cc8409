"""``python -m moe_fast.demo``: turn a dense BERT into experts, train, measure, search."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moe_fast.demo.docstrings import DOMAINS
from moe_fast.demo.pretrained import go_offline, pretrained_folder
from moe_fast.demo.settings import QUICK_HELD_OUT_PAIRS, QUICK_TRAIN_PAIRS, DemoSettings
from moe_fast.version import install_command


def parse_settings(arguments: Sequence[str] | None = None) -> DemoSettings:
    """The settings that the command line asks for."""
    default = DemoSettings()
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
        "--output", type=Path, default=default.output, help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--train-pairs",
        type=_pair_count,
        help=f"of each variant ({default.train_pairs}; with --quick {QUICK_TRAIN_PAIRS})",
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="(%(default)s)")
    parser.add_argument("--device", default=default.device, help="(%(default)s)")
    given = parser.parse_args(arguments)
    settings = replace(default, output=given.output, seed=given.seed, device=given.device)
    if given.quick:
        settings = replace(
            settings,
            train_pairs=QUICK_TRAIN_PAIRS,
            held_out_pairs=QUICK_HELD_OUT_PAIRS,
            usage_documents=QUICK_HELD_OUT_PAIRS,
        )
    return replace(settings, train_pairs=given.train_pairs or settings.train_pairs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when it ran, 1 when something it needs is missing."""
    settings = parse_settings(arguments)
    go_offline()
    try:
        pretrained_folder()
        from moe_fast.demo.run import run_demo  # needs the extras that the message below names
    except ImportError as error:
        print(error, file=sys.stderr)
        if "pip install" not in str(error):
            print(f"The demo needs: {install_command('demo')}", file=sys.stderr)
        return 1
    run_demo(settings)
    return 0


def _pair_count(text: str) -> int:
    value = int(text)
    if value < len(DOMAINS):
        raise argparse.ArgumentTypeError(
            f"must be at least {len(DOMAINS)}, one per domain; got {value}"
        )
    return value


if __name__ == "__main__":
    sys.exit(main())
