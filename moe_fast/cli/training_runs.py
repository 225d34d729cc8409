"""Manages the folder of a training run: checks it, resumes interrupted runs, replaces results."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from moe_fast.files import check_output, write_text

CHECKPOINTS, SETTINGS, INPUTS, LOG = "checkpoints", "train.yaml", "inputs.json", "training_log.json"
_PICTURES = ("training.png", "expert_usage.png")
_BEGUN = (SETTINGS, INPUTS, "runs")  # files that a run writes before its first checkpoint
_ROWS_AT_ONCE = 10_000


def last_checkpoint(checkpoints: Path) -> str | None:
    """Return the newest checkpoint of a run; None if there is none."""
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None


def check_free(output: Path, overwrite: bool) -> None:
    """Raise an error unless a new run may write to the folder.

    Raises:
        FileExistsError: `output` is a file.
        FileExistsError: the folder has anything in it, such as a finished or an interrupted run,
            unless `overwrite` or unless the run was interrupted before its first checkpoint.
        FileExistsError: with `overwrite`, no run of ``moe-fast train`` has written the folder.
    """
    checkpoints = output / CHECKPOINTS
    if output.is_file():
        raise FileExistsError(f"{output} is a file and is kept; a trained model is a folder")
    last = last_checkpoint(checkpoints)
    ours = (checkpoints / SETTINGS).is_file()
    if not overwrite:
        if last and ours and not (output / LOG).exists():
            raise FileExistsError(
                f"{output} holds the checkpoints of an interrupted run, which has done "
                f"{step_of(last)} steps. Go on with: {resume_command(checkpoints)} -- or choose "
                "another output for a new run"
            )
        if not _has_only_begun(output):
            check_output(output)
        return
    check_output(output, overwrite=True)
    used = output.is_dir() and any(output.iterdir()) and not _has_only_begun(output)
    if used and (bool(last) > ours or not (ours or (output / SETTINGS).is_file())):
        raise FileExistsError(
            f"--overwrite: {output} was not written by moe-fast train (it has no {SETTINGS}) and "
            "is kept; choose another output"
        )


def _has_only_begun(output: Path) -> bool:
    """Return whether the folder only holds a run interrupted before its first checkpoint."""
    if not output.is_dir() or [path.name for path in output.iterdir()] != [CHECKPOINTS]:
        return False
    names = [path.name for path in (output / CHECKPOINTS).iterdir()]
    return all(name in _BEGUN or name.startswith(".checkpoint-") for name in names)


def forget_checkpoints(checkpoints: Path) -> None:
    """Remove the checkpoints, settings and inputs of another run; any other files are kept."""
    for path in checkpoints.glob("checkpoint-*"):
        if path.is_dir() and (path / "trainer_state.json").is_file():
            shutil.rmtree(path)
    for name in (SETTINGS, INPUTS):
        (checkpoints / name).unlink(missing_ok=True)


def replaced_results(output: Path) -> list[str]:
    """Return patterns of the files that the previous run has written, which may be replaced."""
    try:
        listed = json.loads((output / LOG).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError):  # no log, or one that is not ours
        listed = []
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return [glob.escape(name) for name in (*names, *_PICTURES)]


def step_of(checkpoint: str) -> int:
    """Return the step at which a checkpoint was saved, which is in its name."""
    return int(checkpoint.rpartition("-")[2])


def resume_command(checkpoints: Path) -> str:
    """Return the command line that resumes an interrupted run."""
    start = ["moe-fast", "train"]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes.isdecimal() and int(processes) > 1:
        start = ["torchrun", "--nproc-per-node", processes, "-m", "moe_fast.cli", "train"]
    return shlex.join([*start, "--config", str(checkpoints / SETTINGS), "--resume"])


# --- what a run has read -------------------------------------------------------------------------


def describe_inputs(model: str, rows: Any, evaluation: Any) -> dict[str, str | None]:
    """Fingerprints of the model and the data of a run, which must be unchanged when it is resumed.

    Returns:
        {"model", "data" or "eval-data": fingerprint}; None without evaluation data.
    """
    from moe_fast.encoding.model_paths import model_fingerprint

    return {
        "model": model_fingerprint(model),
        "data": rows_digest(rows),
        "eval-data": None if evaluation is None else rows_digest(evaluation),
    }


def rows_digest(rows: Any) -> str:
    """Return the SHA-256 of a dataset's columns and values, in hexadecimal."""
    import pyarrow as pa

    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        plain = table.replace_schema_metadata(None).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def save_inputs(checkpoints: Path, inputs: dict[str, str | None]) -> None:
    """Write the result of :func:`describe_inputs` beside the checkpoints."""
    write_text(checkpoints / INPUTS, json.dumps(inputs, indent=2) + "\n")


def check_same_inputs(checkpoints: Path, inputs: dict[str, str | None]) -> None:
    """Raise an error if the model or the data have changed since the run began.

    Nothing is checked if the run did not save its inputs.

    Raises:
        ValueError: they have changed; the error names the option.
        ValueError: the file of the inputs cannot be read.
    """
    path = checkpoints / INPUTS
    if not path.is_file():
        return
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    for name, value in inputs.items():
        if before.get(name) != value:
            flag = "the model" if name == "model" else f"--{name}"
            raise ValueError(
                f"--resume: what {flag} names has other contents than when the run began; a run "
                "going on from here would not equal an uninterrupted one. Put the old contents "
                "back, or choose another output for a new run"
            )


# --- interruption --------------------------------------------------------------------------------


class Interruption(TrainerCallback):
    """Makes Ctrl-C end a run after the current step, with a checkpoint of this step.

    A second Ctrl-C ends the run at once. With several processes the first Ctrl-C does so, without
    a checkpoint, because the processes could not agree on the step.

    Attributes:
        step: the number of steps done; ``None`` before the first.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._asked = False

    @contextmanager
    def listening(self, quiet: bool) -> Iterator[None]:
        """Handle Ctrl-C within the block, which must be the training.

        Args:
            quiet: print no note at the first Ctrl-C.
        """
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if not alone or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
            if not quiet:
                text = "\ninterrupted: this step is finished first; once more stops at once"
                print(text, file=sys.stderr, flush=True)

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the step, which in a resumed run is that of its checkpoint."""
        self.step = state.global_step or None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After Ctrl-C, let the trainer save a checkpoint; end the run if it saves none."""
        self.step = state.global_step
        if self._asked:
            if args.save_strategy == "no":
                raise KeyboardInterrupt
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After Ctrl-C, end the run, as its checkpoint is complete."""
        if self._asked:
            raise KeyboardInterrupt

    def message(self, checkpoints: Path) -> str:
        """Say at which step the run was interrupted, and how to resume it."""
        last = last_checkpoint(checkpoints)
        where = "before the first step" if self.step is None else f"at step {self.step}"
        if last is None:
            if self.step is None:
                return f"interrupted {where}; nothing is lost, the same command starts again"
            return (
                f"interrupted {where}; no checkpoint was saved to go on from. --save-steps N saves "
                "one after every N steps"
            )
        done = step_of(last)
        since = "" if done == self.step else f" (from the checkpoint of step {done})"
        return f"interrupted {where}; go on with: {resume_command(checkpoints)}{since}"
