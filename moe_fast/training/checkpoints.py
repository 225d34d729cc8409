"""Writes checkpoints atomically, and checks a checkpoint before a run resumes from it.

transformers' trainer writes a checkpoint file by file into its final place. A run that is killed
meanwhile would resume from half a checkpoint, and a missing optimizer state is ignored in silence.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformerTrainer
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    get_last_checkpoint,
)

from moe_fast import compat
from moe_fast.files import atomic_folder
from moe_fast.training.locks import hold_folder
from moe_fast.training.log_state import load_log_state, save_log_state
from moe_fast.training.position import POSITION_NAME, DataPosition

STAGING_NAME = ".checkpoint-in-progress"
_STATE_NAME = "trainer_state.json"
_NO_PASS = sys.maxsize  # a pass that no run gets to
_NEEDED = (_STATE_NAME, "modules.json", "optimizer.pt", "scheduler.pt")


def _restore_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# With several processes on CPUs, transformers 5.17 loads the optimizer's state onto "cpu:0", as it
# does for GPUs, and later releases onto "cpu". torch knows "cpu" alone.
torch.serialization.register_package(30, lambda storage: None, _restore_cpu)


class AtomicCheckpointTrainer(SentenceTransformerTrainer):
    """A ``SentenceTransformerTrainer`` whose checkpoints survive a kill or a full disk.

    A checkpoint is written into a folder aside, by all processes, and takes its place
    ``checkpoint-{step}`` in one step when it is whole and on the disk; older ones are removed after
    that (``save_total_limit``). What a killed run left aside goes when the next one starts. A run
    that saves holds its folder: a second one there is refused while it lives.

    A checkpoint says where in the data the run was (:class:`DataPosition`): a resumed run goes on
    there, with data of any form, in whatever pass it stopped. It says too what was added up for the
    next log (:mod:`moe_fast.training.log_state`): logs are those of an uninterrupted run, and the
    ``train_loss`` at the end is the mean over all steps.
    """

    _staging: str | None = None
    _resumed_at: DataPosition | None = None
    _resumed_logs: dict[str, Any] | None = None  # until training begins
    _loss_from = 0  # the step since which losses are added up: of a resumed run 0 where it is known
    _batches_done = 0  # of the pass that is going on
    _batches_of_pass: int | None = None  # as announced; a stream announces none
    _read_around: Any = None  # the dataloader that was being read when training began, if any
    _pass = 0

    @compat.overrides
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As in transformers, with the checkpoint looked at first: see :func:`check_checkpoint`.

        Raises:
            FileNotFoundError, ValueError: of the checkpoint, which cannot be gone on from exactly.
            BlockingIOError: another run is saving its checkpoints in ``args.output_dir``.
        """
        saves = self.args.should_save and self.args.save_strategy != "no"
        with hold_folder(self.args.output_dir) if saves else nullcontext():
            return self._train_from(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train_from(
        self,
        resume_from_checkpoint: str | bool | None,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
    ) -> Any:
        if self.args.should_save:
            clear_leftovers(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            exists = os.path.isdir(self.args.output_dir)
            checkpoint = get_last_checkpoint(self.args.output_dir) if exists else None
            if checkpoint is None:
                raise ValueError(
                    "resume_from_checkpoint=True, but there is no checkpoint in "
                    f"{self.args.output_dir!r}."
                )
        if checkpoint is not None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_checkpoint(checkpoint, num_processes=self.args.world_size)
        self._resumed_at, self._resumed_logs, self._loss_from = None, None, 0
        if checkpoint is not None:
            processes = self.args.process_index, self.args.world_size
            self._resumed_logs = load_log_state(checkpoint, *processes)
        if checkpoint is not None and not self.args.ignore_data_skip:
            self._resumed_at = DataPosition.load(checkpoint)
            self._check_resumable(checkpoint)
        # All trainers share this state, and what a training that failed was reading stays in it.
        self._read_around = self.accelerator.gradient_state.active_dataloader
        output = super().train(checkpoint, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics["train_loss"])

    # --- what was added up for the logs ----------------------------------------------------------

    def _log_state(self) -> dict[str, Any]:
        """What this process has added up since its last log, as JSON can hold it."""
        return {"loss": compat.loss_sums(self), "loss_from": self._loss_from}

    def _restore_logs(self, state: dict[str, Any]) -> None:
        self._loss_from = state.get("loss_from", self.state.global_step)
        compat.restore_loss_sums(self, state.get("loss", []))

    def _take_up_logs(self) -> None:
        """Called twice: when training begins, which may have no step left, and at its first pass.

        By then the callbacks have begun anew, whatever their order.
        """
        if self._resumed_logs is not None:
            self._restore_logs(self._resumed_logs)

    @compat.overrides
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; the loss at the end is of the whole run, not of what was resumed."""
        if "train_loss" in logs and (sums := compat.loss_sums(self)):
            # in place: this is what train() gives back
            logs["train_loss"] = sums[1] / max(self.state.global_step - self._loss_from, 1)
        super().log(logs, start_time)

    # --- where in the data the run is ------------------------------------------------------------

    def _check_resumable(self, checkpoint: str) -> None:
        """Refuse what only a known position resumes exactly, where there is none to go by."""
        streamed = self.train_dataset is not None and not hasattr(self.train_dataset, "__len__")
        if streamed and self._resumed_at is None:
            raise ValueError(
                f"the checkpoint {checkpoint!r} does not say where in the streamed data it was "
                f"saved (no {POSITION_NAME}): a run going on from it would not equal an "
                "uninterrupted one. Resume with args.ignore_data_skip=True if that is meant, which "
                "starts the data anew."
            )

    @compat.overrides
    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The pass and its batches to skip: as the checkpoint says, not as the steps suggest."""
        start: tuple[int, int] = super()._init_training_state(*args, **kwargs)
        if self.state.global_step >= self.state.max_steps:
            return _NO_PASS, 0  # all steps are done; transformers would train one more
        if self._resumed_at is None:
            return start
        return self._resumed_at.epoch, self._resumed_at.batches

    def _begin_pass(self, epoch: int, dataloader: Any) -> None:
        sized = hasattr(self.train_dataset, "__len__")
        self._batches_of_pass = len(dataloader) if sized else None
        resumed = self._resumed_at
        self._pass = epoch
        self._batches_done = resumed.batches if resumed and resumed.epoch == epoch else 0
        self._take_up_logs()
        self._resumed_logs = None

    def _position(self) -> DataPosition:
        reading = self.accelerator.gradient_state.active_dataloader
        more = reading not in (None, self._read_around) and not reading.end_of_dataloader
        # A pass ends after the announced number of batches, also where there are more.
        if more and self._batches_done != self._batches_of_pass:
            return DataPosition(self._pass, self._batches_done)
        streamed = not hasattr(self.train_dataset, "__len__")
        rest = self._batches_done % self.args.gradient_accumulation_steps if streamed else 0
        return DataPosition(self._pass + 1, 0, unfinished=rest)

    @compat.overrides
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; batches are counted, for checkpoints to say how many are done."""
        loss = super().training_step(*args, **kwargs)
        self._batches_done += 1
        return loss

    # --- saving ----------------------------------------------------------------------------------

    @compat.overrides
    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    @compat.overrides
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        place = os.path.join(run_dir, name)
        self._staging = os.path.join(run_dir, STAGING_NAME)
        staged = os.path.join(self._staging, name)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process writes its own random state
            if self.state.best_model_checkpoint == staged:
                self.state.best_model_checkpoint = place
            log_states = gather_object([self._log_state()])
            if self.args.should_save:
                self.state.save_to_json(os.path.join(staged, _STATE_NAME))
                self._position().save(staged)
                save_log_state(log_states, staged)
                _publish(staged, place)
        except Exception as error:
            last = get_last_checkpoint(run_dir) or "none"
            error.add_note(f"{place} was not saved; the last whole checkpoint: {last}.")
            raise
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(place)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            compat.rotate_checkpoints(run_dir, self.args.save_total_limit, best, use_mtime=True)

    @compat.overrides
    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # else it is not in its place yet
            super()._push_from_checkpoint(checkpoint_folder)

    @compat.overrides
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; every process waits for the one that writes."""
        super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    @compat.overrides
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:  # sentence-transformers has every process write the same files
            super()._save(output_dir, state_dict)


def clear_leftovers(output_dir: str | Path) -> None:
    """Remove what a killed run was writing when it died."""
    shutil.rmtree(Path(output_dir) / STAGING_NAME, ignore_errors=True)
    for partial in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def check_checkpoint(folder: str | Path, num_processes: int = 1) -> None:
    """Refuse a checkpoint from which training could not go on exactly.

    Every file must be there and have an end: what is looked at are lengths and tables of contents.
    A checkpoint of another number of processes draws a warning.

    Raises:
        FileNotFoundError: no such folder, or one of the files is missing, which are named.
        ValueError: a file is cut short or no such file at all; it is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {str(folder)!r}.")
    weights = sorted(folder.rglob("*.safetensors"))
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    missing += [] if weights else ["*.safetensors"]
    random_states = sorted(folder.glob("rng_state*.pth"))
    missing += [] if random_states else ["rng_state*.pth"]
    if missing:
        raise FileNotFoundError(
            f"the checkpoint {str(folder)!r} lacks {missing}: it is half-written, or was saved "
            "with save_only_model, and training cannot go on from it."
        )
    for path in [*weights, *folder.glob("*.pt"), *random_states, folder / _STATE_NAME]:
        _check_readable(path)
    if len(random_states) != num_processes:
        warnings.warn(
            f"the checkpoint {str(folder)!r} was saved by {len(random_states)} processes and "
            f"goes on in {num_processes}: the run will not equal an uninterrupted one.",
            stacklevel=2,
        )


def _check_readable(path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        else:
            zipfile.ZipFile(path).close()
    except (SafetensorError, zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): the checkpoint is damaged. Resume from another one."
        ) from error


def _publish(staged: str, place: str) -> None:
    """Put a finished checkpoint in its place, in one step, instead of what may be there."""
    with atomic_folder(place, replaces=("*",)) as folder:
        for entry in Path(staged).iterdir():
            os.rename(entry, folder / entry.name)
