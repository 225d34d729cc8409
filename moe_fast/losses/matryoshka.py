"""Matryoshka: encodes once, and computes a loss at several lengths of the embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moe_fast.losses.base import Columns, EmbeddingLoss, check_one_embedding, check_weight
from moe_fast.losses.citations import citation_of
from moe_fast.losses.info_nce import InfoNCELoss
from moe_fast.ops.checks import check_count


class MatryoshkaLoss(EmbeddingLoss):
    """The weighted sum of a loss over the first d' dimensions, for several d'.

    The texts are encoded once. For a loss of cosine similarities it equals sentence-transformers'
    ``MatryoshkaLoss`` around that loss. For a loss of dot products the truncated embeddings are not
    normalised, as in ``encode(truncate_dim=...)``; sentence-transformers would normalise them.
    Around :class:`moe_fast.losses.InfoNCELoss` all lengths together need no more matrix products
    than the largest length alone.

    Columns and labels are those of the wrapped loss.

    Args:
        loss: any loss of this package over embeddings. :class:`moe_fast.losses.RouterLoss` is not
            one of them; put it around this loss.
        dims: the lengths, each at least 1 and at most the encoder's dimension. Only these lengths
            are trained; name the full one as well if it is to be used.
        weights: one per length, >= 0; by default all 1.

    Attributes:
        last_metrics: those of the wrapped loss at the largest length, and each length's unweighted
            loss as ``loss_{d'}``.

    Raises:
        TypeError: ``loss`` is not a loss of this package over embeddings.
        ValueError: for lengths or weights that do not fit, naming the argument.

    Source: Kusupati et al., arXiv 2205.13147.
    """

    citation = citation_of("kusupati2024matryoshka")

    def __init__(
        self,
        loss: EmbeddingLoss,
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(loss, EmbeddingLoss):
            raise TypeError(
                "loss must be a loss of moe_fast over embeddings (InfoNCELoss, SigmoidLoss, ...), "
                f"whose second half can be called alone; got {type(loss).__name__}. Around a loss "
                "of sentence-transformers use the wrapper of sentence-transformers."
            )
        check_one_embedding("MatryoshkaLoss", loss)
        dims = list(dims)
        if not dims or len(set(dims)) < len(dims):
            raise ValueError(f"dims must name at least one length, and none twice; got {dims}.")
        for dim in dims:
            check_count("dims", dim)
        weights = [1.0] * len(dims) if weights is None else list(weights)
        if len(weights) != len(dims):
            raise ValueError(f"weights must be one per dim; got {len(weights)} for {len(dims)}.")
        for weight in weights:
            check_weight("weights", weight)
        self.loss = loss
        by_length = sorted(zip(dims, weights, strict=True))
        self.dims = [dim for dim, _ in by_length]
        self.weights = [weight for _, weight in by_length]

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The encoder of the wrapped loss."""
        return self.loss.model

    def check_columns(self, columns: Columns, labels: Any) -> None:
        """Let the wrapped loss check, and raise ``ValueError`` for lengths that are too large.

        The lengths are compared with ``get_embedding_dimension``, if the encoder has it; otherwise
        :meth:`from_embeddings` finds out.
        """
        self.loss.check_columns(columns, labels)
        get_dimension = getattr(self.model, "get_embedding_dimension", None)
        if get_dimension is not None:
            self._check_dimension(get_dimension())

    def num_negatives(self, num_columns: int) -> int:
        """The number of hard negatives per row, as the wrapped loss counts them."""
        return self.loss.num_negatives(num_columns)

    def from_embeddings(self, embeddings: list[Tensor], columns: Columns, labels: Any) -> Tensor:
        """See :class:`moe_fast.losses.base.EmbeddingLoss`."""
        self._check_dimension(embeddings[0].shape[-1])
        losses = self._at_lengths(embeddings, columns, labels)
        self.last_metrics = dict(self.loss.last_metrics)
        named = zip(self.dims, losses, strict=True)
        self.last_metrics |= {f"loss_{dim}": loss.detach() for dim, loss in named}
        return sum(w * loss for w, loss in zip(self.weights, losses, strict=True))  # type: ignore

    def _at_lengths(
        self, embeddings: list[Tensor], columns: Columns, labels: Any
    ) -> Sequence[Tensor]:
        """Return the loss at each of ``dims``."""
        if isinstance(self.loss, InfoNCELoss):
            shared = self.loss.at_lengths(embeddings, columns, self.dims)
            if shared is not None:
                return shared.unbind()
        losses = []
        for dim in self.dims:  # the largest comes last, so that its metrics stay
            truncated = [embedding[:, :dim] for embedding in embeddings]
            losses.append(self.loss.from_embeddings(truncated, columns, labels))
        return losses

    def _check_dimension(self, dimension: int | None) -> None:
        if dimension is not None and self.dims[-1] > dimension:
            raise ValueError(
                f"dims must be at most the encoder's dimension, {dimension}; got {self.dims}."
            )

    def get_config_dict(self) -> dict[str, Any]:
        """Return the settings for the model card."""
        return {"loss": type(self.loss).__name__, "dims": self.dims, "weights": self.weights}
