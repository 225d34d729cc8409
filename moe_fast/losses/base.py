"""What the losses over embeddings share: encode once, then compare; a temperature."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast.losses.batch_features import encoder_features
from moe_fast.ops.checks import check_choice
from moe_fast.ops.info_nce.arguments import SIMILARITIES

logger = logging.getLogger(__name__)
Columns = Sequence[Mapping[str, Any]]


class EmbeddingLoss(nn.Module):
    """A loss of the embeddings of a batch's text columns.

    It comes in two halves, :meth:`embed_columns` and :meth:`from_embeddings`, so that a wrapper
    can call the second alone: with truncated embeddings, or with embeddings made elsewhere.

    Attributes:
        model: the encoder: maps a features dict to a dict with ``sentence_embedding`` [B, d].
        last_metrics: after a call, detached [] tensors by name; empty before the first call.
    """

    model: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.last_metrics: dict[str, Tensor] = {}

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Any = None) -> Tensor:
        """The loss of one batch.

        Args:
            sentence_features: one features dict per column, in the order the class describes, all
                with the same B rows.
            labels: what the class describes; most ignore them.

        Returns:
            [] float32 (float64 for a float64 encoder).

        Raises:
            ValueError: for columns or labels that do not fit, before anything is encoded.
        """
        columns = list(sentence_features)
        self.check_columns(columns, labels)
        return self.from_embeddings(self.embed_columns(columns), columns, labels)

    def embed_columns(self, columns: Columns) -> list[Tensor]:
        """[B, d] per column: one pass of the encoder over each."""
        return [
            self.model(encoder_features(self.model, column))["sentence_embedding"]
            for column in columns
        ]

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Raise ``ValueError`` for columns or labels that :meth:`from_embeddings` cannot use."""
        raise NotImplementedError

    def from_embeddings(self, embeddings: list[Tensor], columns: Columns, labels: Any) -> Tensor:
        """The loss, [], of columns that :meth:`check_columns` let through.

        Args:
            embeddings: [B, d] per column.
            columns: their features, for ids (domains, text hashes); not encoded again.
            labels: as in :meth:`forward`.
        """
        raise NotImplementedError

    def num_negatives(self, num_columns: int) -> int:
        """G, the hard negatives per row among so many columns; they are columns 2 .. 1 + G."""
        return num_columns - 2


class TemperatureLoss(EmbeddingLoss):
    """A loss that divides similarities by a temperature, fixed or learned.

    A learned one is the parameter ``log_temperature``, []; it is kept within its bounds.

    Args:
        model: the encoder.
        temperature: similarities are divided by it; where learned, where it starts.
        learn_temperature: whether it is a parameter.
        min_temperature, max_temperature: what a learned temperature is kept within.
        similarity: "cosine" or "dot".

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        learn_temperature: bool,
        min_temperature: float,
        max_temperature: float,
        similarity: str,
    ) -> None:
        super().__init__()
        check_choice("similarity", similarity, SIMILARITIES)
        _check_temperature(temperature, learn_temperature, min_temperature, max_temperature)
        self.model = model
        self.learn_temperature = learn_temperature
        self.min_temperature = min_temperature
        self.max_temperature = max_temperature
        self.similarity = similarity
        self._temperature = float(temperature)
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def current_scale(self) -> float | Tensor:
        """1 / temperature; a [] tensor that carries the gradient where it is learned.

        A learned one is clamped in place, before the graph: clamping inside it would take the
        gradient from a temperature at its bound, which could then never leave it.
        """
        if not self.learn_temperature:
            return 1.0 / self._temperature
        with torch.no_grad():
            low, high = math.log(self.min_temperature), math.log(self.max_temperature)
            self.log_temperature.clamp_(low, high)
        return torch.exp(-self.log_temperature)

    @property
    def temperature(self) -> float:
        """The temperature in use, as a number (on a GPU a learned one costs a sync)."""
        if not self.learn_temperature:
            return self._temperature
        value = math.exp(self.log_temperature.detach().item())
        return min(max(value, self.min_temperature), self.max_temperature)

    @property
    def scale(self) -> float:
        """What similarities are multiplied by, 1 / temperature, as a number."""
        return 1.0 / self.temperature

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card; what is learned is given as it is now."""
        settings: dict[str, Any] = {}
        for cls in reversed(type(self).__mro__[: type(self).__mro__.index(EmbeddingLoss)]):
            parameters = inspect.signature(cls).parameters.values()
            names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
            settings |= {name: getattr(self, name) for name in names if hasattr(self, name)}
        return settings


def temperature_metric(scale: float | Tensor, name: str = "temperature") -> dict[str, Tensor]:
    """``{"temperature": []}`` where it is learned, for ``last_metrics``."""
    return {name: 1 / scale.detach()} if isinstance(scale, Tensor) else {}


def warn_of_lone_pair() -> None:
    """Say, in training, that a batch of one pair teaches nothing."""
    if torch.is_grad_enabled():
        logger.warning(
            "a batch of one pair without hard negatives has nothing to learn from: a loss of 0."
        )


def check_num_columns(loss: nn.Module, columns: Columns, at_least: int, meaning: str) -> None:
    """Raise ``ValueError`` where there are too few text columns; ``meaning`` says what they are."""
    if len(columns) < at_least:
        number = {2: "two", 3: "three"}[at_least]
        raise ValueError(
            f"{type(loss).__name__} needs at least {number} text columns ({meaning}); "
            f"got {len(columns)}."
        )


def check_weight(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` can weigh a term of a loss."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite; got {value!r}.")


def _check_temperature(value: float, learned: bool, low: float, high: float) -> None:
    if not (0.0 < value < math.inf):
        raise ValueError(f"temperature must be a positive, finite number; got {value!r}.")
    if not learned:
        return
    if not (0.0 < low < high < math.inf):
        raise ValueError(
            "min_temperature and max_temperature must satisfy 0 < min < max; "
            f"got {low!r} and {high!r}."
        )
    if not low <= value <= high:
        raise ValueError(
            "a learned temperature must start within [min_temperature, max_temperature] = "
            f"[{low!r}, {high!r}]; got temperature={value!r}."
        )
