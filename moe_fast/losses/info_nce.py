"""InfoNCE, also called the multiple negatives ranking loss, for any sentence encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_fast import ops
from moe_fast.losses.features import encoder_features, text_ids
from moe_fast.ops.checks import check_choice
from moe_fast.ops.info_nce import SIMILARITIES

_NEGATIVES_FROM = ("all", "same_domain")


class InfoNCELoss(nn.Module):
    """Cross entropy of each anchor's similarities against its own positive.

    The candidates of a row are the positives of the batch and every hard negative; see
    :func:`moe_fast.ops.info_nce` for the mathematics. With its defaults, on a batch without
    duplicate texts, it is sentence-transformers' ``MultipleNegativesRankingLoss`` (scale 20, one
    direction): a model trained with that one can change over without a change in numbers, which
    is why ``symmetric`` is off here unless asked for. ``symmetric=True`` is that loss's
    ``directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"``.

    Works on mixture-of-experts and dense encoders alike. Negatives come from this process's batch.

    Args:
        model: a ``SentenceTransformer``, or any module that maps a features dict to a dict with
            ``sentence_embedding`` [B, d].
        temperature: similarities are divided by it; where learned, where it starts.
        learn_temperature: makes ``log_temperature`` a parameter. The learning rate of an encoder
            hardly moves it: give it its own (``learning_rate_mapping={"log_temperature": 1e-3}``
            in sentence-transformers' training arguments). Train with
            :class:`moe_fast.training.MoESentenceTransformerTrainer`, which saves and restores it.
        min_temperature, max_temperature: what a learned temperature is kept within.
        similarity: "cosine" or "dot".
        symmetric: the mean of both directions; positives to anchors sees no hard negatives.
        mask_duplicates: the same text is never its own negative. Texts are compared by the hashes
            of :class:`moe_fast.training.DomainDataCollator`, else by their tokens.
        negatives_from: "all", or "same_domain" (needs the collator's ``domain_ids``).
        label_smoothing: in [0, 1).

    Attributes:
        last_metrics: after a call, the detached ``in_batch_accuracy`` and, where learned, the
            ``temperature``, both [] on the device; empty before the first call.

    Raises:
        ValueError: for a value out of range, naming the argument.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 0.05,
        learn_temperature: bool = False,
        min_temperature: float = 0.01,
        max_temperature: float = 1.0,
        similarity: str = "cosine",
        symmetric: bool = False,
        mask_duplicates: bool = True,
        negatives_from: str = "all",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("similarity", similarity, SIMILARITIES)
        check_choice("negatives_from", negatives_from, _NEGATIVES_FROM)
        _check_temperature(temperature, learn_temperature, min_temperature, max_temperature)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1); got {label_smoothing!r}.")
        self.model = model
        self.learn_temperature = learn_temperature
        self.min_temperature = min_temperature
        self.max_temperature = max_temperature
        self.similarity = similarity
        self.symmetric = symmetric
        self.mask_duplicates = mask_duplicates
        self.negatives_from = negatives_from
        self.label_smoothing = label_smoothing
        self.last_metrics: dict[str, Tensor] = {}
        self._temperature = float(temperature)
        if learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Any = None) -> Tensor:
        """The loss of one batch.

        Args:
            sentence_features: one features dict per column: anchor, positive, any number of hard
                negatives, all with the same B rows.
            labels: ignored; row i's positive is row i.

        Returns:
            [] float32 (float64 for a float64 encoder).

        Raises:
            ValueError: fewer than two columns, columns of different sizes, or no ``domain_ids``
                where ``negatives_from="same_domain"`` needs them.
        """
        columns = list(sentence_features)
        if len(columns) < 2:
            raise ValueError(
                "InfoNCELoss needs at least two text columns (anchor, positive, then hard "
                f"negatives); got {len(columns)}."
            )
        ids = self._row_and_col_ids(columns)
        domain_ids = self._domain_ids(columns)
        embeddings = [self._embed(column) for column in columns]
        scale = self._scale()
        loss, stats = ops.info_nce(
            embeddings[0],
            embeddings[1],
            interleave(embeddings[2:]) if len(columns) > 2 else None,
            scale=scale,
            similarity=self.similarity,
            symmetric=self.symmetric,
            row_ids=ids[0],
            col_ids=ids[1],
            domain_ids=domain_ids,
            label_smoothing=self.label_smoothing,
            return_stats=True,
        )
        self.last_metrics = {"in_batch_accuracy": stats.accuracy.detach()}
        if isinstance(scale, Tensor):
            self.last_metrics["temperature"] = 1 / scale.detach()
        return loss

    def _embed(self, features: Mapping[str, Any]) -> Tensor:
        return self.model(encoder_features(self.model, features))["sentence_embedding"]

    def _scale(self) -> float | Tensor:
        """1 / temperature.

        A learned one is clamped in place, before the graph: clamping inside it would take the
        gradient from a temperature at its bound, which could then never leave it.
        """
        if not self.learn_temperature:
            return 1.0 / self._temperature
        with torch.no_grad():
            low, high = math.log(self.min_temperature), math.log(self.max_temperature)
            self.log_temperature.clamp_(low, high)
        return torch.exp(-self.log_temperature)

    def _row_and_col_ids(
        self, columns: list[Mapping[str, Any]]
    ) -> tuple[Tensor | None, Tensor | None]:
        ids = text_ids(columns) if self.mask_duplicates else None
        if ids is None:
            return None, None
        hard = [interleave(ids[2:])] if len(ids) > 2 else []
        return ids[0], torch.cat([ids[1], *hard])

    def _domain_ids(self, columns: list[Mapping[str, Any]]) -> Tensor | None:
        if self.negatives_from == "all":
            return None
        if "domain_ids" not in columns[0]:
            raise ValueError(
                'negatives_from="same_domain" needs domain_ids in the features; got '
                f"{sorted(columns[0])}. Train with moe_fast.training.DomainDataCollator and a "
                "dataset that has a domain column."
            )
        return columns[0]["domain_ids"]

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
        """The settings, for the model card; ``temperature`` is the one in use."""
        return {
            "temperature": self.temperature,
            "learn_temperature": self.learn_temperature,
            "min_temperature": self.min_temperature,
            "max_temperature": self.max_temperature,
            "similarity": self.similarity,
            "symmetric": self.symmetric,
            "mask_duplicates": self.mask_duplicates,
            "negatives_from": self.negatives_from,
            "label_smoothing": self.label_smoothing,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the loss's source, for the model card."""
        return """
@misc{oord2018cpc,
    title = {Representation Learning with Contrastive Predictive Coding},
    author = {van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol},
    year = {2018},
    eprint = {1807.03748},
    archivePrefix = {arXiv},
    primaryClass = {cs.LG},
}
"""


def interleave(columns: list[Tensor]) -> Tensor:
    """G columns [B, ...] to [B * G, ...]: row i's are at ``i * G .. i * G + G - 1``."""
    shapes = {tuple(column.shape) for column in columns}
    if len(shapes) > 1:
        raise ValueError(f"the negative columns must have one shape; got {sorted(shapes)}.")
    return torch.stack(columns, dim=1).flatten(0, 1)


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
