"""Checkpoints: whole or not there; refused, by name, where they are not whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformerTrainingArguments
from tiny_models import folder_names, make_moe, make_pairs
from transformers import TrainerCallback, TrainerState

from moe_fast import compat
from moe_fast.losses import InfoNCELoss
from moe_fast.training import DomainBatchSampler, MoESentenceTransformerTrainer
from moe_fast.training.checkpoints import STAGING_NAME, check_checkpoint, clear_leftovers


def make_trainer(folder: Path, *callbacks: TrainerCallback, **args):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "batch_sampler": DomainBatchSampler,
    }
    model = make_moe()
    return MoESentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(str(folder), **(settings | args)),
        make_pairs(24),
        loss=InfoNCELoss(model, learn_temperature=True),
        eval_dataset=make_pairs(6, seed=1),
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_trainer(folder).train()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- resuming ------------------------------------------------------------------------------------


def test_a_whole_checkpoint_is_accepted(saved):
    check_checkpoint(saved / "checkpoint-2")
    with pytest.warns(UserWarning, match="saved by 1 processes and goes on in 2"):
        check_checkpoint(saved / "checkpoint-2", num_processes=2)


FILES = [
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "model.safetensors",
    "loss_state.safetensors",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["half", "empty", "other"])
def test_a_damaged_file_is_named_before_anything_is_loaded(saved, tmp_path, name, damage):
    broken = shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    path = broken / name
    data = path.read_bytes()
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "other": b"\x01" * 64}[damage])
    trainer = make_trainer(tmp_path / "run")
    before = {key: value.clone() for key, value in trainer.loss.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*checkpoint is damaged"):
        trainer.train(resume_from_checkpoint=str(broken))
    assert all(torch.equal(before[k], v) for k, v in trainer.loss.state_dict().items())


@pytest.mark.parametrize("name", [*FILES[:5], "modules.json"])
def test_a_missing_file_is_named(saved, tmp_path, name):
    broken = shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    (broken / name).unlink()
    if name == "model.safetensors":
        (broken / "loss_state.safetensors").unlink()
    pattern = {"model.safetensors": r"\*.safetensors", "rng_state.pth": r"rng_state\*.pth"}
    with pytest.raises(FileNotFoundError, match=rf"lacks \['{pattern.get(name, name)}'\]"):
        make_trainer(tmp_path / "run").train(resume_from_checkpoint=str(broken))


def test_nothing_to_resume_from(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint '.*nowhere'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


# --- saving --------------------------------------------------------------------------------------


class FullDisk(TrainerCallback):
    """From step 3 on no file can grow beyond ``limit`` bytes: the real writers fail."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.before[1]))

    def restore(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("limit", [6_000, 20_000, 90_000])
def test_a_write_that_fails_leaves_the_previous_checkpoint(tmp_path, limit):
    """RLIMIT_FSIZE stands for the full disk; the larger limits let the smaller files through."""
    disk = FullDisk(limit)
    trainer = make_trainer(tmp_path, disk, save_total_limit=1)
    kept: dict[str, bytes] = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            kept.update(contents(tmp_path))

    trainer.add_callback(Keep())
    try:
        with pytest.raises(Exception) as caught:  # OSError, or safetensors' or torch's own
            trainer.train()
    finally:
        disk.restore()
    assert "checkpoint-4 was not saved; the last whole checkpoint: " in caught.value.__notes__[0]
    assert caught.value.__notes__[0].endswith("checkpoint-2.")
    assert kept
    assert contents(tmp_path) == kept
    assert folder_names(tmp_path) == {"checkpoint-2"}
    resumed = make_trainer(tmp_path, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert folder_names(tmp_path) == {"checkpoint-4"}


@pytest.mark.parametrize("call", range(1, 5))
def test_a_full_disk_at_any_of_torchs_files(tmp_path, monkeypatch, call):
    """ENOSPC at the training arguments, the optimizer, the scheduler, the random state."""
    trainer = make_trainer(tmp_path)
    save, calls = torch.save, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4 + call:  # of the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    assert folder_names(tmp_path) == {"checkpoint-2"}
    check_checkpoint(tmp_path / "checkpoint-2")


def test_older_checkpoints_go_only_when_the_new_one_is_in_its_place(tmp_path, monkeypatch):

    seen = []
    rotate = compat.rotate_checkpoints

    def record(output_dir, *args, **kwargs):
        seen.append(folder_names(output_dir))
        rotate(output_dir, *args, **kwargs)

    monkeypatch.setattr(compat, "rotate_checkpoints", record)
    make_trainer(tmp_path, max_steps=6, save_total_limit=1).train()
    assert seen == [
        {"checkpoint-2"},
        {"checkpoint-2", "checkpoint-4"},
        {"checkpoint-4", "checkpoint-6"},
    ]
    assert folder_names(tmp_path) == {"checkpoint-6"}


def test_a_checkpoint_of_an_earlier_run_is_replaced_as_a_whole(tmp_path):
    make_trainer(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / "stale").touch()
    make_trainer(tmp_path, max_steps=2, learning_rate=1e-2).train()
    assert not (tmp_path / "checkpoint-2" / "stale").exists()
    assert folder_names(tmp_path) == {"checkpoint-2"}


def test_what_a_killed_run_left_goes_and_nothing_else(tmp_path):
    (tmp_path / STAGING_NAME / "checkpoint-2").mkdir(parents=True)
    (tmp_path / ".checkpoint-2.0a1b2c3d.partial").mkdir()
    for name in ("checkpoint-2", "logs", ".cache"):
        (tmp_path / name).mkdir()
    clear_leftovers(tmp_path)
    assert folder_names(tmp_path) == {"checkpoint-2", "logs", ".cache"}
    clear_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("save_total_limit", [None, 1])
def test_the_best_checkpoint_is_where_the_state_says(tmp_path, save_total_limit):
    """At the time of saving its folder has another name, which must not be remembered."""
    args = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 6,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "save_total_limit": save_total_limit,
    }
    trainer = make_trainer(tmp_path, **args)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert best.is_dir()
    for folder in tmp_path.glob("checkpoint-*"):
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        step = int(folder.name.split("-")[1])
        losses = {e["step"]: e["eval_loss"] for e in state.log_history if "eval_loss" in e}
        assert list(losses) == list(range(2, step + 1, 2))
        expected = tmp_path / f"checkpoint-{min(losses, key=losses.get)}"
        assert state.best_model_checkpoint == str(expected)


def test_a_pushed_checkpoint_is_in_its_place(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    pushed = []

    def push(self, folder):
        pushed.append((Path(folder), json.loads((Path(folder) / FILES[0]).read_text())))

    monkeypatch.setattr(MoESentenceTransformerTrainer.__mro__[2], "_push_from_checkpoint", push)
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "init_hf_repo", lambda *a, **k: None)
    trainer.train()
    assert [folder for folder, _ in pushed] == [
        tmp_path / "checkpoint-2",
        tmp_path / "checkpoint-4",
    ]
    assert [state["global_step"] for _, state in pushed] == [2, 4]
