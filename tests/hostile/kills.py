"""Commands killed at random moments: after a rerun their results have the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.hostile.bases import lines

# What says when or by what arguments something was written.
_NO_RESULT = (".yaml", ".md", "training_args.bin", "trainer_state.json")


@dataclass(frozen=True)
class Command:
    """A command line, and how the same run goes on.

    Attributes:
        arguments: without the output.
        output: its name.
        again: added to the rerun.
    """

    name: str
    arguments: tuple[str, ...]
    output: str
    again: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kill:
    """One command that was killed after some seconds, and run again."""

    command: str
    seconds: float
    is_right: bool
    message: str

    def __str__(self) -> str:
        end = "the same bytes" if self.is_right else f"WRONG: {self.message}"
        return f"{self.command} killed after {self.seconds:.2f} s: {end}"


def commands(folder: Path) -> list[Command]:
    """On models and files of ``bases.make_models``; each takes some seconds."""
    rng = random.Random(0)
    words = [" ".join(f"w{rng.randrange(50)}" for _ in range(5)) for _ in range(8000)]
    texts = lines(folder / "kill_texts.jsonl", [{"text": text} for text in words])
    pairs = lines(
        folder / "kill_pairs.jsonl",
        [{"a": a, "b": f"{a} {b}"} for a, b in zip(words[:400], words[400:800], strict=True)],
    )
    dense = str(folder / "dense")
    return [
        Command("embed", (dense, str(texts), "--chunk-size", "100", "--threads", "1"), "x.npy"),
        Command("mine", (str(pairs), "--bm25", "--negatives", "3"), "x.jsonl"),
        Command("upcycle", (dense, "--num-experts", "3"), "x"),
        Command(
            "train",
            (
                *(dense, "--data", str(pairs), "--max-steps", "30", "--batch-size", "4"),
                *("--save-steps", "3", "--device", "cpu"),
            ),
            "x",
            ("--resume",),
        ),
    ]


def run_kills(count: int, folder: Path, seed: int, processes: int) -> list[Kill]:
    """Kill each command in turn at moments drawn evenly from its time.

    Args:
        processes: commands at a time; each is also run whole first.
    """
    rng = random.Random(seed)
    runs = commands(folder)[:count]
    with ThreadPoolExecutor(processes) as pool:
        whole = dict(zip(runs, pool.map(partial(run_whole, folder=folder), runs), strict=True))
        drawn = [(runs[i % len(runs)], folder / f"kill{i}", rng.random()) for i in range(count)]
        return list(pool.map(lambda kill: kill_once(*kill, *whole[kill[0]]), drawn))


def run_whole(command: Command, folder: Path) -> tuple[float, dict[str, str]]:
    """How long a command takes undisturbed, and what comes out."""
    place = folder / "whole" / command.name
    place.mkdir(parents=True)
    begin = time.monotonic()
    code, said = ended(start(command, place / command.output))
    if code:
        raise RuntimeError(f"{command.name} fails unkilled: {said}")
    return time.monotonic() - begin, content(place / command.output)


def kill_once(
    command: Command, place: Path, share: float, seconds: float, wanted: dict[str, str]
) -> Kill:
    """Kill a command at a moment of its time, run it again, compare.

    Args:
        share: in [0, 1): of the time in which it works; it loads for the first third.
        seconds, wanted: how long it takes, and what should come out.
    """
    place.mkdir()
    output, moment = place / command.output, seconds * (0.3 + 0.7 * share)
    process = start(command, output)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    ended(process)
    resumes = command.again and any(output.glob("checkpoint-*"))
    code, said = ended(start(command, output, *(command.again if resumes else ())))
    if code and "exists already" not in said:  # else it had ended before the kill
        return Kill(command.name, moment, False, said[-500:])
    found = content(output)
    differing = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    left = [p.name for p in place.iterdir() if p.name.startswith(".") or p.suffix == ".parts"]
    wrong = [*(f"{name} differs" for name in differing), *(f"{name} is left" for name in left)]
    return Kill(command.name, moment, not wrong, "; ".join(wrong)[:500])


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit code of a process and what it said on stderr."""
    said = process.communicate()[1].decode(errors="replace")
    return process.returncode, said


def start(command: Command, output: Path, *more: str) -> subprocess.Popen[bytes]:
    """The command in a process group of its own."""
    line = [sys.executable, "-m", "moe_fast.cli", command.name, *command.arguments]
    return subprocess.Popen(
        [*line, "-o", str(output), "--quiet", *more],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def content(output: Path) -> dict[str, str]:
    """The hash of every file of a result by its name, but of those that tell how it was made."""
    if output.is_dir():
        files = [
            path
            for path in sorted(output.rglob("*"))
            if path.is_file()
            and not path.name.endswith(_NO_RESULT)
            and not any(part.startswith(("checkpoint-", "runs", ".")) for part in path.parts[-3:])
        ]
    else:
        files = [
            path for path in [output, output.with_name(output.name + ".ids.jsonl")] if path.exists()
        ]
    return {path.relative_to(output.parent).as_posix(): digest(path) for path in files}


def digest(path: Path) -> str:
    """The hash of a file's bytes; of JSON without the names of folders in it."""
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(json.loads(data), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()
