"""A run with everything random that training has, which can die at any point of a save."""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from processes import CONTEXT
from sentence_transformers import SentenceTransformerTrainingArguments
from tiny_models import make_moe, make_pairs
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from moe_fast.losses import InfoNCELoss, RouterLoss
from moe_fast.training import DomainBatchSampler, MoESentenceTransformerTrainer

SAVE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
MAX_STEPS = 14


def resumable_run(folder: Path, steps: Any = None, events: Any = None, die_at: int = 0) -> None:
    """Trains ``MAX_STEPS`` steps, from the last checkpoint in ``folder`` where there is one.

    Args:
        folder: of the checkpoints.
        steps: a shared integer: the steps that are done.
        events: a shared integer: how often a save has touched a file or folder.
        die_at: the event at which to die by SIGKILL, before it happens; 0 for never.
    """

    class CountSteps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if steps is not None:
                steps.value = state.global_step

    if events is not None:
        _watch_saves(events, die_at)
    model = make_moe(dropout=0.2)
    trainer = make_trainer(model, folder, make_loss(model), make_pairs(48), CountSteps())
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)


def make_loss(model: Any) -> RouterLoss:
    """With a learned temperature and a running joint distribution over all processes."""
    loss = InfoNCELoss(model, learn_temperature=True)
    return RouterLoss(loss, load_balance=0.05, mutual_information=0.1, joint_decay=0.9)


def make_trainer(model: Any, folder: Path, loss: Any, dataset: Any, *callbacks: Any) -> Any:
    """Alone with mixed batches, in company with batches of one domain."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    args = SentenceTransformerTrainingArguments(
        str(folder),
        batch_sampler=functools.partial(DomainBatchSampler, mode="mixed" if alone else "single"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=MAX_STEPS,
        learning_rate=1e-3,
        learning_rate_mapping={"log_temperature": 1e-2},
        weight_decay=0.01,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=7,
    )
    return MoESentenceTransformerTrainer(
        model, args, dataset, loss=loss, swap_pairs=True, callbacks=list(callbacks)
    )


def _watch_saves(events: Any, die_at: int) -> None:
    def watch(event: str, args: tuple) -> None:
        if event not in SAVE_EVENTS or "checkpoint-" not in str(args[0]):
            return
        events.value += 1
        if events.value == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def shared_integer() -> Any:
    return CONTEXT.Value("q", 0)


if __name__ == "__main__":
    resumable_run(Path(sys.argv[1]))
    torch.distributed.barrier()  # none takes the connections of another away as it exits
    torch.distributed.destroy_process_group()
