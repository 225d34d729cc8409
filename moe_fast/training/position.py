"""Saves a run's position in its data: the current pass and how many of its batches are done.

transformers calculates the position from the number of steps and the length of the data. But a
stream has no length, and a sampler that avoids duplicates may give fewer batches than its length,
so that a resumed run would continue at the wrong place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

POSITION_NAME = "data_position.json"


@dataclass(frozen=True)
class DataPosition:
    """The position in the data at which a checkpoint was saved.

    Attributes:
        epoch: the pass over the data to continue, from 0.
        batches: the number of batches of this pass that are done (in this process).
        unfinished: the number of batches whose gradients no optimizer step has used yet. Gradients
            are not saved.
    """

    epoch: int
    batches: int
    unfinished: int = 0

    def save(self, folder: str | Path) -> None:
        """Write ``data_position.json`` into a checkpoint."""
        Path(folder, POSITION_NAME).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> DataPosition | None:
        """Load the position from a checkpoint; ``None`` if the checkpoint has none.

        Raises:
            ValueError: the file is damaged.
            ValueError: there are unfinished batches, so that training cannot continue exactly.
        """
        path = Path(folder, POSITION_NAME)
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not all(type(value) is int and value >= 0 for value in values.values()):
                raise ValueError("counts must be whole numbers of at least 0")
            position = cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): the checkpoint is damaged.") from (
                error
            )
        if position.unfinished:
            raise ValueError(
                f"the checkpoint {str(folder)!r} was saved at the end of a pass over streamed "
                f"data, with the gradients of {position.unfinished} batches not applied, which no "
                "checkpoint holds: a run going on from it would not equal an uninterrupted one. "
                "Resume from an earlier checkpoint; with gradient accumulation over streamed data, "
                "save by steps: save_strategy='steps'."
            )
        return position
