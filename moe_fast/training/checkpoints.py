"""Writes checkpoints atomically, and checks a checkpoint before a run resumes from it.

transformers' trainer writes a checkpoint file by file into its final folder. If it is killed while
it does so, a later run resumes from half a checkpoint, and silently ignores a missing optimizer
state.
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
_NO_PASS = sys.maxsize  # the number of a pass over the data that no run reaches
_NEEDED = (_STATE_NAME, "modules.json", "optimizer.pt", "scheduler.pt")


def _restore_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# With several processes on CPUs, transformers 5.17 loads the optimizer's state onto "cpu:0", in
# analogy to GPUs; later releases use "cpu". torch itself only knows "cpu".
torch.serialization.register_package(30, lambda storage: None, _restore_cpu)


class AtomicCheckpointTrainer(SentenceTransformerTrainer):
    """A ``SentenceTransformerTrainer`` whose checkpoints survive a kill or a full disk.

    All processes write a checkpoint into a temporary folder. It is renamed to ``checkpoint-{step}``
    when it is complete and on the disk, and older checkpoints are removed after that
    (``save_total_limit``). The temporary folder of a killed run is removed when the next run
    starts. While a run that saves checkpoints is alive, a second run in the same folder is refused.

    A checkpoint holds the position in the data (:class:`DataPosition`), from which a resumed run
    continues, in any pass over the data and also with streamed data. It also holds the sums for the
    next log (:mod:`moe_fast.training.log_state`). The logs are therefore those of an uninterrupted
    run, and the ``train_loss`` at the end is the mean over all steps.
    """

    _staging: str | None = None
    _resumed_at: DataPosition | None = None
    _resumed_logs: dict[str, Any] | None = None  # None again once training has begun
    _loss_from = 0  # step after which losses are added up; not 0 if a checkpoint lacks the sums
    _batches_done = 0  # in the current pass over the data
    _batches_of_pass: int | None = None  # the dataloader's length; None for a stream
    _read_around: Any = None  # the dataloader that was being read when training began, if any
    _pass = 0

    @compat.overrides
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as transformers does, but check the checkpoint first (:func:`check_checkpoint`).

        Raises:
            FileNotFoundError, ValueError: the checkpoint cannot be resumed from exactly.
            ValueError: `resume_from_checkpoint` is True and there is no checkpoint.
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
        # All trainers share this state, which still has the dataloader of a training that failed.
        self._read_around = self.accelerator.gradient_state.active_dataloader
        output = super().train(checkpoint, trial, ignore_keys_for_eval)
        return output._replace(training_loss=output.metrics["train_loss"])

    # --- sums for the logs -----------------------------------------------------------------------

    def _log_state(self) -> dict[str, Any]:
        """Return the sums of this process since its last log, as JSON can hold them."""
        return {"loss": compat.loss_sums(self), "loss_from": self._loss_from}

    def _restore_logs(self, state: dict[str, Any]) -> None:
        self._loss_from = state.get("loss_from", self.state.global_step)
        compat.restore_loss_sums(self, state.get("loss", []))

    def _take_up_logs(self) -> None:
        """Restore the sums of a resumed run.

        This is called when training begins, because there may be no step left, and again at the
        first pass over the data, when all callbacks have reset their own sums.
        """
        if self._resumed_logs is not None:
            self._restore_logs(self._resumed_logs)

    @compat.overrides
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, but with the ``train_loss`` of all steps, also before resuming.

        If the checkpoint lacks the sums, it is the mean of the steps since then.
        """
        if "train_loss" in logs and (sums := compat.loss_sums(self)):
            # in place, because train() returns this dict
            logs["train_loss"] = sums[1] / max(self.state.global_step - self._loss_from, 1)
        super().log(logs, start_time)

    # --- position in the data --------------------------------------------------------------------

    def _check_resumable(self, checkpoint: str) -> None:
        """Raise ValueError for streamed data if the checkpoint lacks the position in the data."""
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
        """Return the pass to continue, and the number of its batches to skip.

        They are those of the checkpoint; transformers would calculate them from the steps.
        """
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
        # A pass ends after the dataloader's length, even if there are more batches.
        if more and self._batches_done != self._batches_of_pass:
            return DataPosition(self._pass, self._batches_done)
        streamed = not hasattr(self.train_dataset, "__len__")
        rest = self._batches_done % self.args.gradient_accumulation_steps if streamed else 0
        return DataPosition(self._pass + 1, 0, unfinished=rest)

    @compat.overrides
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch as transformers does, and count it for the position in the data."""
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
        if self._staging is None:  # otherwise the checkpoint is still in the temporary folder
            super()._push_from_checkpoint(checkpoint_folder)

    @compat.overrides
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as transformers does; every process waits for the one that writes."""
        super().save_model(output_dir, _internal_call)
        self.accelerator.wait_for_everyone()

    @compat.overrides
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:  # in sentence-transformers all processes write the same files
            super()._save(output_dir, state_dict)


def clear_leftovers(output_dir: str | Path) -> None:
    """Remove the unfinished checkpoints that a killed run left."""
    shutil.rmtree(Path(output_dir) / STAGING_NAME, ignore_errors=True)
    for partial in Path(output_dir).glob(f".{PREFIX_CHECKPOINT_DIR}-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def check_checkpoint(folder: str | Path, num_processes: int = 1) -> None:
    """Raise an error if training could not continue exactly from a checkpoint.

    All files must exist and be complete. Large files are not read: only their headers or tables of
    contents are compared with their lengths. If the checkpoint was saved by another number of
    processes, a warning says so.

    Raises:
        FileNotFoundError: the folder does not exist, or files are missing; the error names them.
        ValueError: a file is truncated or damaged; the error names it.
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
    """Rename a finished checkpoint to its final name, replacing a folder of that name."""
    with atomic_folder(place, replaces=("*",)) as folder:
        for entry in Path(staged).iterdir():
            os.rename(entry, folder / entry.name)
