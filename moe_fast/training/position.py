"""Saves a run's position in its data: the pass over them, and the batches of it that are done.

transformers works it out from the number of steps and the length of the data: a stream has none,
and batches without duplicates may be fewer than announced. A resumed run would go on elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

POSITION_NAME = "data_position.json"


@dataclass(frozen=True)
class DataPosition:
    """The position that a checkpoint holds.

    Attributes:
        epoch: the pass to go on in, from 0.
        batches: of that pass that are done (of this process).
        unfinished: batches whose gradients no optimizer step has used yet; no file holds those.
    """

    epoch: int
    batches: int
    unfinished: int = 0

    def save(self, folder: str | Path) -> None:
        """Write ``data_position.json`` into a checkpoint that is being made."""
        Path(folder, POSITION_NAME).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> DataPosition | None:
        """Reads what :meth:`save` wrote; ``None`` in a checkpoint that another trainer saved.

        Raises:
            ValueError: the file is none of ours, or training cannot go on from there exactly.
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
