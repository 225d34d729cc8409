"""A run killed by SIGKILL, while it trains and while it saves, ends as one never interrupted."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import KILLED, Run
from resumable_run import MAX_STEPS, resumable_run, shared_integer
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from moe_fast.training.checkpoints import STAGING_NAME, check_checkpoint


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """An uninterrupted run: its processes, its folder, how often its saves touch the disk."""
    folder = tmp_path_factory.mktemp("whole")
    events = shared_integer()
    run = Run(folder / "log", request.param, resumable_run, folder / "run", None, events)
    run.expect_success()
    return request.param, folder / "run", events.value


def start(folder: Path, world_size: int, *args) -> Run:
    return Run(folder / "log", world_size, resumable_run, folder / "run", *args)


def kill_at(run: Run, steps, step: int, delay: float) -> None:
    while steps.value < step and run.alive():
        time.sleep(0.001)
    time.sleep(delay)
    run.kill()


def last_step(folder: Path) -> int:
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    return int(last.rsplit("-", 1)[-1]) if last else 0


def check_all(folder: Path, world_size: int) -> None:
    """What a killed run leaves as checkpoints are whole ones."""
    for checkpoint in folder.glob("checkpoint-*"):
        check_checkpoint(checkpoint, world_size)


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, the loss's state, the optimizer's, random states."""
    tensors = {}
    for path in checkpoint.rglob("*.safetensors"):
        tensors |= {f"{path.name}.{k}": v for k, v in load_file(path).items()}
    for path in checkpoint.glob("*.pt"):
        tensors |= _flatten(torch.load(path, weights_only=True), path.name)
    for path in checkpoint.glob("rng_state*.pth"):
        tensors[path.name] = torch.load(path, weights_only=False)["cpu"]
    return tensors


def _flatten(value, name: str) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, int | float):
        return {name: torch.tensor(value, dtype=torch.float64)}
    items = value.items() if isinstance(value, dict) else enumerate(value or ())
    parts = (_flatten(v, f"{name}.{k}") for k, v in items if not isinstance(v, str))
    return {k: v for part in parts for k, v in part.items()}


@pytest.mark.parametrize("whole", [1, 2], indirect=True, ids=["one process", "two processes"])
def test_killed_twice_and_resumed(whole, tmp_path):
    world_size, expected, events = whole
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    folder = tmp_path / "run"

    steps = shared_integer()
    run = start(tmp_path, world_size, steps)
    kill_at(run, steps, rng.randint(1, MAX_STEPS - 4), rng.uniform(0, 0.03))
    assert run.codes() == [KILLED] * world_size, run.tail()
    check_all(folder, world_size)
    before = last_step(folder)

    die_at = rng.randint(1, events // 8)  # within the next save or the one after
    run = start(tmp_path, world_size, None, shared_integer(), die_at)
    while all(process.is_alive() for process in run.processes):
        time.sleep(0.001)
    run.kill()
    assert KILLED in run.codes(), run.tail()
    check_all(folder, world_size)
    assert last_step(folder) >= before

    start(tmp_path, world_size).expect_success()
    assert_same_end(folder, expected)


@pytest.mark.parametrize("whole", [2], indirect=True, ids=["two processes"])
def test_torchrun_gives_the_same(whole, tmp_path):
    """The launcher that people use, from start to end: the same files, to the last bit."""
    world_size, expected, _ = whole
    script = Path(__file__).with_name("resumable_run.py")
    command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}", script]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command), str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert_same_end(tmp_path / "run", expected)


def assert_same_end(folder: Path, expected: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    assert not (folder / STAGING_NAME).exists()
    name = f"checkpoint-{MAX_STEPS}"
    theirs, ours = state_of(expected / name), state_of(folder / name)
    assert len(theirs) > 100
    assert list(theirs) == list(ours)
    assert [key for key in theirs if not torch.equal(theirs[key], ours[key])] == []
    temperature = theirs["loss_state.safetensors.loss.log_temperature"].exp().item()
    assert temperature != pytest.approx(0.05, rel=1e-3)  # it has learned
    assert theirs["loss_state.safetensors.running_joint"].sum() > 0
