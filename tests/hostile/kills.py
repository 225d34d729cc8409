"""Commands killed at random moments: after a rerun their results have the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.hostile.bases import lines
from tests.hostile.cases import clock

# What says when or by what arguments something was written.
_NO_RESULT = (".yaml", ".md", "training_args.bin", "trainer_state.json")

_SAID = "said"
_TIMES = ("_per_second", "_runtime")
# Loading takes far longer than the commands' work: it is done once, and no kill falls into it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.hostile.loaded"])


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
    words = [" ".join(f"w{rng.randrange(50)}" for _ in range(5)) for _ in range(3000)]
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


def run_kills(count: int, folder: Path, seed: int, processes: int) -> Iterator[Kill]:
    """Kill each command in turn at moments drawn evenly from its time; yields as they end.

    Args:
        processes: commands at a time; each is also run whole first.
    """
    if not count:
        return
    rng = random.Random(seed)
    runs = commands(folder)[:count]
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})  # of the processes
    with ThreadPoolExecutor(processes) as pool:
        whole = dict(zip(runs, pool.map(partial(run_whole, folder=folder), runs), strict=True))
        drawn = [(runs[i % len(runs)], folder / f"kill{i}", rng.random()) for i in range(count)]
        yield from pool.map(lambda kill: kill_once(*kill, *whole[kill[0]]), drawn)


def run_whole(command: Command, folder: Path) -> tuple[float, dict[str, str]]:
    """How long a command takes undisturbed, and what comes out."""
    place = folder / "whole" / command.name
    place.mkdir(parents=True)
    process = start(command, place / command.output)
    begin = clock(process.pid or "self")
    seconds, code = ended(process, begin)
    if code:
        raise RuntimeError(f"{command.name} fails unkilled: {said(place)}")
    return seconds, content(place / command.output)


def kill_once(
    command: Command, place: Path, share: float, seconds: float, wanted: dict[str, str]
) -> Kill:
    """Kill a command at a moment of its time, run it again, compare.

    Args:
        share: in [0, 1): of its time.
        seconds, wanted: how long it takes, and what should come out.
    """
    place.mkdir()
    output, moment = place / command.output, seconds * share
    process = start(command, output)
    begin = clock(process.pid or "self")
    ended(process, begin, moment)
    resumes = command.again and any(output.glob("checkpoints/checkpoint-*"))
    process = start(command, output, *(command.again if resumes else ()))
    _, code = ended(process, 0.0)
    if code and "exists already" not in said(place):  # else it had ended before the kill
        return Kill(command.name, moment, False, said(place)[-500:])
    found = content(output)
    differing = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    left = [p.name for p in place.iterdir() if p.name.startswith(".") or p.suffix == ".parts"]
    wrong = [*(f"{name} differs" for name in differing), *(f"{name} is left" for name in left)]
    return Kill(command.name, moment, not wrong, "; ".join(wrong)[:500])


def start(command: Command, output: Path, *more: str) -> BaseProcess:
    """The command in a process of its own, forked from one that has loaded the libraries."""
    line = [command.name, *command.arguments, "-o", str(output), "--quiet", *more]
    process = _CONTEXT.Process(target=_command, args=(line, str(output.parent / _SAID)))
    process.start()
    return process


def ended(process: BaseProcess, begin: float, limit: float = math.inf) -> tuple[float, int | None]:
    """(seconds, exit code) of a process, which is killed after ``limit`` seconds.

    Both as :func:`tests.hostile.cases.clock` counts them: a busy machine moves no kill.
    """
    seconds = 0.0
    while process.is_alive():
        seconds = clock(process.pid or "self") - begin
        if seconds >= limit:
            process.kill()
        process.join(0.002)
    return seconds, process.exitcode


def said(place: Path) -> str:
    """What the last command said on stderr."""
    return (place / _SAID).read_text(errors="replace")


def _command(line: list[str], said: str) -> None:
    """Run a command line in this process, as ``python -m moe_fast.cli`` does."""
    from moe_fast.cli import main

    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(descriptor, 2)
    sys.argv = ["moe-fast", *line]
    main()


def content(output: Path) -> dict[str, str]:
    """The hash of every file of a result, but of checkpoints, by its name."""
    if output.is_dir():
        files = [
            path
            for path in sorted(output.rglob("*"))
            if path.is_file()
            and not any(part.startswith(("checkpoint-", "runs", ".")) for part in path.parts[-3:])
        ]
    else:
        beside = [output.with_name(output.name + suffix) for suffix in (".ids.jsonl", ".yaml")]
        files = [path for path in (output, *beside) if path.exists()]
    return {path.relative_to(output.parent).as_posix(): digest(path) for path in files}


def digest(path: Path) -> str:
    """The hash of a file's bytes; of a log without how long anything took."""
    if path.name.endswith(_NO_RESULT):
        return "it is there"
    data = path.read_bytes()
    if path.suffix == ".json":
        data = json.dumps(timeless(json.loads(data)), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()


def timeless(content: Any) -> Any:
    """JSON without the seconds and rates that are in it."""
    if isinstance(content, list):
        return [timeless(value) for value in content]
    if isinstance(content, dict):
        return {n: timeless(v) for n, v in content.items() if not n.endswith(_TIMES)}
    return content
