"""The folder of a training run: whose it is, how an interrupted one goes on, what is replaced."""

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
_BEGUN = (SETTINGS, INPUTS, "runs")  # what a run has there before its first checkpoint
_ROWS_AT_ONCE = 10_000


def last_checkpoint(checkpoints: Path) -> str | None:
    """The newest checkpoint of a run, if there is any."""
    return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None


def check_free(output: Path, overwrite: bool) -> None:
    """Raise unless a new run may write to the folder.

    Raises:
        FileExistsError: a file; a run that is finished, or that was interrupted and can go on;
            with ``overwrite`` a folder that no run has written.
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
    """Whether all there is of a run that was interrupted before its first checkpoint."""
    if not output.is_dir() or [path.name for path in output.iterdir()] != [CHECKPOINTS]:
        return False
    names = [path.name for path in (output / CHECKPOINTS).iterdir()]
    return all(name in _BEGUN or name.startswith(".checkpoint-") for name in names)


def forget_checkpoints(checkpoints: Path) -> None:
    """Remove what another run has saved there; anything else stays."""
    for path in checkpoints.glob("checkpoint-*"):
        if path.is_dir() and (path / "trainer_state.json").is_file():
            shutil.rmtree(path)
    for name in (SETTINGS, INPUTS):
        (checkpoints / name).unlink(missing_ok=True)


def replaced_results(output: Path) -> list[str]:
    """Patterns of the files that the run before has written; what others put there stays."""
    try:
        listed = json.loads((output / LOG).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or none of ours
        listed = []
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return [glob.escape(name) for name in (*names, *_PICTURES)]


def step_of(checkpoint: str) -> int:
    """The step at which a checkpoint was saved, by its name."""
    return int(checkpoint.rpartition("-")[2])


def resume_command(checkpoints: Path) -> str:
    """The command line with which an interrupted run goes on."""
    start = ["moe-fast", "train"]
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes.isdecimal() and int(processes) > 1:
        start = ["torchrun", "--nproc-per-node", processes, "-m", "moe_fast.cli", "train"]
    return shlex.join([*start, "--config", str(checkpoints / SETTINGS), "--resume"])


# --- what a run has read -------------------------------------------------------------------------


def describe_inputs(model: str, rows: Any, evaluation: Any) -> dict[str, str | None]:
    """What must not change under an interrupted run: the contents of its model and its data."""
    from moe_fast.encoding.model_paths import model_fingerprint

    return {
        "model": model_fingerprint(model),
        "data": rows_digest(rows),
        "eval-data": None if evaluation is None else rows_digest(evaluation),
    }


def rows_digest(rows: Any) -> str:
    """The SHA-256 of a dataset's columns and values, in hexadecimal."""
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
    """Write what :func:`describe_inputs` gives beside the checkpoints."""
    write_text(checkpoints / INPUTS, json.dumps(inputs, indent=2) + "\n")


def check_same_inputs(checkpoints: Path, inputs: dict[str, str | None]) -> None:
    """Refuse to go on with other contents than a run has begun with.

    Raises:
        ValueError: the model or the data have changed; the option that names them is named.
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
    """Ctrl-C ends a run after the step that is going on, with a checkpoint of it.

    A second Ctrl-C ends it at once. Of several processes all end at once, without a checkpoint:
    they could not agree on the step.

    Attributes:
        step: steps that are done; ``None`` before the first.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._asked = False

    @contextmanager
    def listening(self, quiet: bool) -> Iterator[None]:
        """The block is the training."""
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
        """A resumed run begins at the step of its checkpoint."""
        self.step = state.global_step or None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Has the trainer save, where it saves at all."""
        self.step = state.global_step
        if self._asked:
            if args.save_strategy == "no":
                raise KeyboardInterrupt
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the run when its checkpoint is whole."""
        if self._asked:
            raise KeyboardInterrupt

    def message(self, checkpoints: Path) -> str:
        """What was interrupted, and how it goes on."""
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
