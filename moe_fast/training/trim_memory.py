"""Gives memory that was freed in training back to the system."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moe_fast.malloc import malloc_trim


class TrimMemoryCallback(TrainerCallback):
    """Calls glibc's ``malloc_trim`` after optimizer steps.

    The tensors of a step are freed at its end, but glibc's malloc keeps much of their memory for
    itself, more after each batch of another length. Trimming gives it back, so that the process is
    no larger between steps than what it holds; it changes neither numbers nor settings of malloc.
    The next step must take the memory again, which costs time. Works on any model and device, for
    the main memory of a Linux system with glibc; elsewhere it warns and does nothing.

    Args:
        every_steps: the number of optimizer steps from one trim to the next.

    Raises:
        ValueError: `every_steps` is not an integer of at least 1.
    """

    def __init__(self, every_steps: int = 1) -> None:
        if isinstance(every_steps, bool) or not isinstance(every_steps, int) or every_steps < 1:
            raise ValueError(f"every_steps must be an integer of at least 1; got {every_steps!r}.")
        self.every_steps = every_steps
        self._trim = malloc_trim()
        if self._trim is None:
            warnings.warn(
                "TrimMemoryCallback: this system has no malloc_trim, which is part of glibc; "
                "nothing will be trimmed.",
                stacklevel=2,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trim after every `every_steps` steps."""
        if self._trim is not None and state.global_step % self.every_steps == 0:
            self._trim(0)
