"""Saves the sums that a run has collected for its next log, with a checkpoint.

A log is a mean over some steps, and a checkpoint may be saved between two logs. transformers does
not save the sums: in a resumed run the next log, and the loss at the end, are means over fewer
steps.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
LOG_STATE_NAME = "log_state.json"


def save_log_state(states: list[dict[str, Any]], folder: str | Path) -> None:
    """Write the log states of all processes, in their order, into a checkpoint."""
    Path(folder, LOG_STATE_NAME).write_text(json.dumps(states), encoding="utf-8")


def load_log_state(folder: str | Path, process: int, num_processes: int) -> dict[str, Any]:
    """Load the log state of one process from a checkpoint.

    If the checkpoint has none, or those of another number of processes, a warning says so, and the
    result is empty.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder, LOG_STATE_NAME)
    states: Any = []
    if path.is_file():
        try:
            states = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(states, list) or not all(isinstance(s, dict) for s in states):
                raise ValueError("it must list JSON objects")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}): the checkpoint is damaged.") from (
                error
            )
    if len(states) == num_processes:
        own: dict[str, Any] = states[process]
        return own
    logger.warning(
        "the checkpoint %r does not say what %d processes had added up for their logs: the next "
        "log, and the loss at the end, are of the steps from here on.",
        str(folder),
        num_processes,
    )
    return {}
