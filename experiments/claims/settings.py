"""The settings that all arms share, and the cells in the order in which they are run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from moe_fast.demo import comparison

PLACES = ("own domain", "everything", "unknown domain")
"""What is searched: the documents of the query's domain; all of them; all of them, and the query's
domain is the one that a predictor finds."""


@dataclass(frozen=True)
class Settings(comparison.Settings):
    """The settings of a cell; most are those of the demo.

    Attributes:
        seed: of the training: the routers, dropout and the order of the batches.
        split_seed: of the data: the same for all cells, so that they can be compared by query.
        precision: "bfloat16" (autocast, in training and evaluation) or "float32".
        lora_rank, lora_alpha: of the experts of arm (i).
        lora_learning_rate: of arm (i), larger than ``learning_rate``, because its experts start
            as nothing and all other weights stay as they are. It was not searched for.
    """

    tokens: int = 128
    split_seed: int = 0
    precision: str = "bfloat16"
    load_balance: float = 0.05
    mutual_information: float = 0.1
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_learning_rate: float = 1e-3


class Cell(NamedTuple):
    """One training and its measurement."""

    model: str
    data: str
    arm: str
    seed: int

    @property
    def file(self) -> str:
        """The name of its record."""
        return f"{self.model}-{self.data}-{self.arm}-{self.seed}.json"


FIRST_ARMS = ("b", "c", "e", "e0", "d", "a")
LATER_ARMS = (
    *("f", "h", "i", "j"),
    *("g-token-balance", "g-token-information", "g-sentence-balance", "g-sentence-information"),
)


def all_cells() -> Iterator[Cell]:
    """Every cell, the ones that decide most first.

    (a) to (e) on MedQuAD with three seeds come first, then the other arms, then the other data,
    then the model of 110 M parameters, whose folder ``MOE_FAST_MPNET`` names.
    """
    for arms in (FIRST_ARMS, LATER_ARMS):
        for seed in range(3):
            yield from _of("medquad", arms, seed)
    for data in ("far", "abstracts"):
        for seed in range(3):
            yield from _of(data, (*FIRST_ARMS, *LATER_ARMS), seed)
    yield from _of("medquad", FIRST_ARMS, 0, model="mpnet")


def _of(data: str, arms: tuple[str, ...], seed: int, model: str = "minilm") -> Iterator[Cell]:
    for arm in arms:
        if arm != "a" or seed == 0:  # nothing in it is random
            yield Cell(model, data, arm, seed)
