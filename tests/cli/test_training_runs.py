"""The folder of a training run: interrupted, resumed, overwritten, shared."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from transformers import TrainerCallback

from moe_fast.cli import training
from moe_fast.cli.training_runs import (
    check_free,
    check_same_inputs,
    forget_checkpoints,
    resume_command,
    rows_digest,
    save_inputs,
)
from tests.cli.conftest import read_jsonl, write_jsonl

FEW = ["--data", "pairs.jsonl", "--max-steps", 4, "--batch-size", 4, "--device", "cpu", "--quiet"]


def a_checkpoint(folder: Path, step: int, settings: bool = True) -> Path:
    """What a run has left in its output after ``step`` steps."""
    place = folder / "checkpoints" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    (place / "trainer_state.json").write_text("{}")
    if settings:
        (folder / "checkpoints" / "train.yaml").write_text("model: m\n")
    return place


# --- whose the folder is -------------------------------------------------------------------------


def test_an_interrupted_run_is_gone_on_with_and_not_deleted(tmp_path):
    a_checkpoint(tmp_path, 3)
    with pytest.raises(FileExistsError) as caught:
        check_free(tmp_path, overwrite=False)
    message = str(caught.value)
    assert "an interrupted run, which has done 3 steps" in message
    assert resume_command(tmp_path / "checkpoints") in message
    assert "overwrite" not in message


def test_a_run_that_has_only_begun_may_begin_again(tmp_path):
    for name in ("train.yaml", "inputs.json", ".checkpoint-in-progress"):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).touch()
    check_free(tmp_path, overwrite=False)
    (tmp_path / "checkpoints" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        check_free(tmp_path, overwrite=False)


@pytest.mark.parametrize("name", ["notes.txt", "checkpoints/checkpoint-3/trainer_state.json"])
def test_overwrite_replaces_no_folder_of_somebody_else(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"was not written by moe-fast train \(it has no tr"):
        check_free(tmp_path, overwrite=True)
    assert path.read_text() == "mine"


def test_a_file_is_no_output(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match="is a file and is kept"):
        check_free(tmp_path / "out", overwrite=True)


def test_only_checkpoints_are_forgotten(tmp_path):
    a_checkpoint(tmp_path, 3)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "checkpoint-best").mkdir()
    (checkpoints / "checkpoint-best" / "only-copy.txt").touch()
    forget_checkpoints(checkpoints)
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-best"]


def test_the_command_is_quoted_and_names_the_processes(monkeypatch):
    place = Path("my runs/$(x)/checkpoints")
    command = shlex.split(resume_command(place))
    assert command == ["moe-fast", "train", "--config", f"{place}/train.yaml", "--resume"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command(place).startswith("torchrun --nproc-per-node 2 -m moe_fast.cli train ")


# --- what a run has read -------------------------------------------------------------------------


def test_the_digest_is_of_the_values_alone():
    rows = Dataset.from_dict({"a": ["x", "y", "z"], "b": ["1", "2", "3"]})
    parts = concatenate_datasets([rows.select([0]), rows.select([1, 2])])
    assert rows_digest(parts) == rows_digest(rows)
    others = [rows.select([1, 0, 2]), rows.rename_column("a", "c"), rows.select([0, 1])]
    assert rows_digest(rows) not in map(rows_digest, others)


def test_other_contents_are_not_gone_on_with(tmp_path):
    before = {"model": "m", "data": "d", "eval-data": None}
    check_same_inputs(tmp_path, before)  # a run that has written none
    save_inputs(tmp_path, before)
    check_same_inputs(tmp_path, before)
    for name, message in (("model", "what the model names"), ("data", "what --data names")):
        with pytest.raises(ValueError, match=f"{message} has other contents"):
            check_same_inputs(tmp_path, before | {name: "x"})


# --- interruption --------------------------------------------------------------------------------


class PressCtrlC(TrainerCallback):
    """In the middle of step ``step``."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def pressed(monkeypatch):
    """Has the next trainers be interrupted in the given step; none any more at 0."""
    build, at = training.build_trainer, [0]

    def built(*args):
        trainer = build(*args)
        trainer.add_callback(PressCtrlC(at[0]))
        return trainer

    monkeypatch.setattr(training, "build_trainer", built)
    return lambda step: at.__setitem__(0, step)


def test_ctrl_c_saves_the_step_and_the_run_goes_on_as_if_never_stopped(
    moe_fast_cli, workspace, pressed
):
    arguments = ["train", "mixture", *FEW, "--learning-rate", "1e-3"]
    pressed(3)
    result = moe_fast_cli(*arguments, "-o", "out")
    assert result.exit_code == 130, result.output
    command = "moe-fast train --config out/checkpoints/train.yaml --resume"
    assert result.stderr == f"moe-fast train: interrupted at step 3; go on with: {command}\n"
    pressed(0)
    again = moe_fast_cli(*arguments, "-o", "out")
    assert again.exit_code == 1 and f"Go on with: {command}" in again.stderr

    rows = read_jsonl("pairs.jsonl")
    (workspace / "pairs.jsonl").unlink()
    write_jsonl(workspace / "pairs.jsonl", rows[::-1])
    changed = moe_fast_cli(*shlex.split(command)[1:])
    assert changed.exit_code == 1 and "what --data names has other contents" in changed.stderr
    write_jsonl(workspace / "pairs.jsonl", rows)

    resumed = moe_fast_cli(*shlex.split(command)[1:])
    assert resumed.exit_code == 0, resumed.output
    whole = moe_fast_cli(*arguments, "-o", "whole")
    assert whole.exit_code == 0, whole.output
    ours, theirs = (load_file(f"{name}/model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_ctrl_c_without_checkpoints_says_how_to_have_some(moe_fast_cli, workspace, pressed):
    pressed(2)
    result = moe_fast_cli("train", "mixture", *FEW, "--save-steps", 0, "-o", "out")
    assert result.exit_code == 130
    assert "interrupted at step 2; no checkpoint was saved" in result.stderr
    assert "--save-steps N" in result.stderr
    pressed(0)
    result = moe_fast_cli("train", "mixture", *FEW, "-o", "out")  # begins again
    assert result.exit_code == 0, result.output


HOLD = """
import sys, time
from moe_fast.training.locks import hold_folder
with hold_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_the_first_goes_on(moe_fast_cli, workspace):
    place = workspace / "out" / "checkpoints"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        (place / "train.yaml").write_text("model: m\n")
        for flags in ([], ["--overwrite"]):
            result = moe_fast_cli("train", "mixture", *FEW, "-o", "out", *flags)
            assert result.exit_code == 1
            assert "another training run is writing to out/checkpoints" in result.stderr
        assert holder.poll() is None and (place / "train.yaml").exists()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_overwrite_keeps_what_others_have_put_there(moe_fast_cli, workspace):
    result = moe_fast_cli("train", "mixture", *FEW, "-o", "out")
    assert result.exit_code == 0, result.output
    (workspace / "out" / "notes.txt").write_text("mine")
    log = json.loads((workspace / "out" / "training_log.json").read_text())
    assert {"model.safetensors", "train.yaml", "training_log.json"} <= set(log["files"])
    shutil.copy("out/train.yaml", "out/old.yaml")
    result = moe_fast_cli("train", "dense-model", *FEW, "-o", "out", "--overwrite")
    assert result.exit_code == 0, result.output
    assert (workspace / "out" / "notes.txt").read_text() == "mine"
    assert not (workspace / "out" / "expert_usage.png").exists()


def test_half_precision_is_trained_in_float32(moe_fast_cli, workspace):
    from moe_fast.inference import load_model

    load_model("mixture", device="cpu").bfloat16().save_pretrained("half")
    flags = [flag for flag in FEW if flag != "--quiet"]
    result = moe_fast_cli("train", "half", *flags, "-o", "out")
    assert result.exit_code == 0, result.output
    assert "half is saved in bfloat16" in result.stdout
    assert load_model("out", device="cpu").dtype == torch.float32
