"""What a run has added up for its next log, kept with a checkpoint.

A log is a mean over some steps, and a checkpoint may fall between two logs. transformers starts
afresh there: the next log of a resumed run is a mean over fewer steps, and so is the loss at the
end.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
LOG_STATE_NAME = "log_state.json"


def save_log_state(states: list[dict[str, Any]], folder: str | Path) -> None:
    """Write the states of all processes, in their order, into a checkpoint that is being made."""
    Path(folder, LOG_STATE_NAME).write_text(json.dumps(states), encoding="utf-8")


def load_log_state(folder: str | Path, process: int, num_processes: int) -> dict[str, Any]:
    """The state of one process; nothing, with a warning, in a checkpoint that has none for it.

    Raises:
        ValueError: the file is none of ours.
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
