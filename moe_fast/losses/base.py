"""Base classes and checks of the losses over embeddings.

:class:`EmbeddingLoss` encodes every text column once and then compares the embeddings;
:class:`TemperatureLoss` adds a temperature. In every shape, B is the number of rows (texts per
column) and d the dimension of the embeddings.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_fast.losses.batch_features import encoder_features
from moe_fast.ops.checks import check_choice
from moe_fast.ops.info_nce.arguments import SIMILARITIES

logger = logging.getLogger(__name__)
Columns = Sequence[Mapping[str, Any]]


class EmbeddingLoss(nn.Module):
    """A loss of the embeddings of a batch's text columns.

    It is computed in two steps, :meth:`embed_columns` and :meth:`from_embeddings`. A wrapper can
    call the second one alone, on truncated embeddings or on embeddings made elsewhere.

    Attributes:
        model: the encoder; it maps a features dict to a dict with ``sentence_embedding`` [B, d].
        several_outputs: whether a text has other outputs than one embedding [d], so that wrappers
            which change embeddings cannot take the loss.
        last_metrics: after a call, detached [] tensors by name; empty before the first call.
    """

    model: nn.Module
    several_outputs: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.last_metrics: dict[str, Tensor] = {}

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Any = None) -> Tensor:
        """Compute the loss of one batch.

        Args:
            sentence_features: one features dict per column, in the order that the class's docstring
                gives, all with the same B rows.
            labels: as the class's docstring describes; most losses ignore them.

        Returns:
            [] float32 (float64 for a float64 encoder).

        Raises:
            ValueError: the columns or labels do not fit; raised before anything is encoded.
        """
        columns = list(sentence_features)
        self.check_columns(columns, labels)
        return self.from_embeddings(self.embed_columns(columns), columns, labels)

    def embed_columns(self, columns: Columns) -> list[Tensor]:
        """Encode each column in one forward pass; returns one tensor [B, d] per column."""
        return [
            self.model(encoder_features(self.model, column))["sentence_embedding"]
            for column in columns
        ]

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Raise ``ValueError`` for columns or labels that :meth:`from_embeddings` cannot use."""
        raise NotImplementedError

    def from_embeddings(self, embeddings: list[Tensor], columns: Columns, labels: Any) -> Tensor:
        """Compute the loss, [], from embeddings of columns that passed :meth:`check_columns`.

        Args:
            embeddings: [B, d] per column.
            columns: the columns' features. Only ids (domains, text hashes) are read from them; the
                texts are not encoded again.
            labels: as in :meth:`forward`.
        """
        raise NotImplementedError

    def num_negatives(self, num_columns: int) -> int:
        """The number of hard negatives per row, G, from the number of columns.

        Columns 0 and 1 are the anchor and the positive; every further column is a hard negative.
        """
        return num_columns - 2


class TemperatureLoss(EmbeddingLoss):
    """A loss that divides similarities by a temperature, fixed or learned.

    A learned temperature is stored as its logarithm, in the parameter ``log_temperature``, [], and
    is clamped to its bounds at every call.

    Args:
        model: the encoder.
        temperature: similarities are divided by it; if it is learned, its initial value.
        learn_temperature: whether the temperature is a parameter.
        min_temperature, max_temperature: bounds of a learned temperature.
        similarity: "cosine" or "dot".

    Raises:
        ValueError: a value is out of range; the message names the argument.
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
        """Return 1 / temperature; for a learned temperature a [] tensor that has a gradient.

        A learned temperature is clamped in place, outside the graph. A clamp inside the graph would
        give a temperature beyond its bound a gradient of 0, so that it could never return.
        """
        if not self.learn_temperature:
            return 1.0 / self._temperature
        with torch.no_grad():
            low, high = math.log(self.min_temperature), math.log(self.max_temperature)
            self.log_temperature.clamp_(low, high)
        return torch.exp(-self.log_temperature)

    @property
    def temperature(self) -> float:
        """The current temperature as a number; reading a learned one on a GPU synchronises."""
        if not self.learn_temperature:
            return self._temperature
        value = math.exp(self.log_temperature.detach().item())
        return min(max(value, self.min_temperature), self.max_temperature)

    @property
    def scale(self) -> float:
        """The factor on similarities, 1 / temperature, as a number."""
        return 1.0 / self.temperature

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card; learned values as they are now."""
        settings: dict[str, Any] = {}
        for cls in reversed(type(self).__mro__[: type(self).__mro__.index(EmbeddingLoss)]):
            parameters = inspect.signature(cls).parameters.values()
            names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
            settings |= {name: getattr(self, name) for name in names if hasattr(self, name)}
        return settings


def temperature_metric(scale: float | Tensor, name: str = "temperature") -> dict[str, Tensor]:
    """Return ``{name: temperature []}`` for ``last_metrics``; empty if the temperature is fixed."""
    return {name: 1 / scale.detach()} if isinstance(scale, Tensor) else {}


def warn_of_lone_pair() -> None:
    """Log a warning, if gradients are enabled, that a batch of one pair trains nothing."""
    if torch.is_grad_enabled():
        logger.warning(
            "a batch of one pair without hard negatives has nothing to learn from: a loss of 0."
        )


def check_num_columns(loss: nn.Module, columns: Columns, at_least: int, meaning: str) -> None:
    """Raise ``ValueError`` for fewer than ``at_least`` columns; ``meaning`` describes them."""
    if len(columns) < at_least:
        number = {2: "two", 3: "three"}[at_least]
        raise ValueError(
            f"{type(loss).__name__} needs at least {number} text columns ({meaning}); "
            f"got {len(columns)}."
        )


def check_one_embedding(wrapper: str, loss: EmbeddingLoss) -> None:
    """Raise ``TypeError`` if ``wrapper`` cannot take a loss of several outputs per text."""
    if loss.several_outputs:
        raise TypeError(
            f"{wrapper} takes a loss of one embedding per text; {type(loss).__name__} compares "
            "several outputs of a text."
        )


def check_weight(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value``, the weight of a term, is at least 0 and finite."""
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
