"""Texts that know their domain, for pipelines that take texts alone.

sentence-transformers' losses and evaluators of SparseEncoder and CrossEncoder hand texts to the
model, and nothing beside them. A :class:`DomainText` is such a text and says its domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_fast.encoding.domain_prediction import PredictsDomains, with_predictions
from moe_fast.encoding.domains import asks_for_prediction, checked_domain


class DomainText(str):
    """A text with the name of its domain; everything else takes it for the plain text.

    ``MoESparseEncoder`` and ``MoECrossEncoder`` read the domain, of a pair that of its first text.
    Operations on it, such as concatenation, give plain texts.

    Attributes:
        domain: a name.
    """

    domain: str

    def __new__(cls, text: str, domain: str) -> DomainText:
        """``text``, of the domain of this name."""
        made = super().__new__(cls, text)
        made.domain = domain
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.domain


def with_domains(
    model: Any, inputs: Any, domain: Any, options: Mapping[str, Any] | None = None
) -> Any:
    """The inputs of ``encode`` or ``predict``, each with its domain; as they are where none is.

    Args:
        model: the pipeline.
        inputs: a text or pair of texts, or a sequence of them.
        domain: one name, one per input, or ``None``; "auto" in the place of a name where the
            pipeline predicts domains.
        options: those of ``encode``, of which the prompt counts for a prediction.

    Raises:
        ValueError, TypeError: as :func:`moe_fast.encoding.domains.checked_domain`, and for inputs
            that are no texts.
    """
    if domain is None or inputs is None:
        return inputs
    singular = model.is_singular_input(inputs)
    given = [inputs] if singular else list(inputs)
    predicts = isinstance(model, PredictsDomains)
    config = model.transformers_model.config
    checked = checked_domain(config, domain, len(given), auto=predicts)
    if checked is not None and asks_for_prediction(checked):
        checked = with_predictions(model, given, checked, options or {})
    names = [checked] * len(given) if isinstance(checked, str) else checked
    marked = [_marked(text, name) for text, name in zip(given, names or (), strict=True)]
    return marked[0] if singular else marked


def _marked(text: Any, domain: str) -> Any:
    if isinstance(text, str):
        return DomainText(text, domain)
    if isinstance(text, Sequence) and len(text) == 2 and isinstance(text[0], str):
        return [DomainText(text[0], domain), text[1]]
    raise TypeError(f"a domain needs texts, or pairs of texts; got {type(text).__name__}.")


def domain_ids_of(config: Any, inputs: Sequence[Any]) -> Tensor | None:
    """[B] int64, indices into ``config.domains``; ``None`` where no input says its domain.

    Raises:
        ValueError: for an unknown domain, and for inputs without one, unless the model has a
            ``default_domain``.
    """
    texts = [item if isinstance(item, str) else item[0] for item in inputs]
    names = [getattr(text, "domain", None) for text in texts]
    if not any(names):
        return None
    names = [config.default_domain if name is None else name for name in names]
    if None in names:
        raise ValueError(
            f"each text must have a domain where others of its batch have; text {names.index(None)}"
            " has none, and the model has no default_domain."
        )
    return torch.tensor([config.domain_id(name) for name in names])
