"""The door of every conversion: it decides what was given, and gives the result the same form."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_fast.encoding.loading import load_as_saved
from moe_fast.models.loading import tokenizer_beside
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.saving import check_no_adapter


@dataclass(frozen=True)
class Given:
    """An encoder that is to be converted, and what is around it.

    Attributes:
        encoder: a transformers model.
        pipeline: the ``SentenceTransformer``, ``SparseEncoder`` or ``CrossEncoder`` that holds it;
            ``None``: there is none.
        path: where a bare encoder was loaded from; ``None``: it was in memory.
    """

    encoder: PreTrainedModel
    pipeline: Any = None
    path: str | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The pipeline's, or the one beside the bare encoder's files; ``None``: not known."""
        if self.pipeline is not None:
            return self.pipeline.tokenizer
        return None if self.path is None else tokenizer_beside(self.path)

    def check_domains(self, routing: str, domains: Any) -> None:
        """Raise ``ValueError`` where ``encode`` could not choose an expert by its domain."""
        if self.pipeline is not None and routing == "enforced" and not domains:
            raise ValueError(
                "domains must be given with routing='enforced' for a SentenceTransformer, whose "
                "encode chooses the expert by domain; got none."
            )

    def around(self, encoder: PreTrainedModel) -> Any:
        """``encoder`` in a copy of the pipeline, all but the encoder kept; or bare as it is."""
        if self.pipeline is None:
            return encoder
        from moe_fast.conversion.pipelines import with_encoder

        return with_encoder(self.pipeline, encoder)


def given(model: Any) -> Given:
    """What a model in memory is, an encoder or one of sentence-transformers' models.

    Raises:
        TypeError: for a ``SentenceTransformer`` of several encoders, or of none in its first
            module. Other models count as encoders, which the conversion checks.
    """
    if isinstance(model, PreTrainedModel) or not _is_pipeline(model):
        return Given(model)
    from moe_fast.conversion.pipelines import encoder_of

    return Given(encoder_of(model), model)


def _is_pipeline(model: Any) -> bool:
    return hasattr(model, "encode") or hasattr(model, "predict")  # a CrossEncoder has no encode


def loaded(model_or_path: Any, name: str = "model_or_path") -> Given:
    """As :func:`given`, also for what lies in a folder or under a hub id.

    Raises:
        TypeError: for what is neither a path nor a model; ``name`` is the argument's.
        ValueError, OSError: as :func:`moe_fast.encoding.loading.load_as_saved`.
    """
    if isinstance(model_or_path, (str, os.PathLike)):
        path = os.fspath(model_or_path)
        model = load_as_saved(path)
        return Given(model, path=path) if isinstance(model, PreTrainedModel) else given(model)
    if not isinstance(model_or_path, nn.Module):
        raise TypeError(f"{name} must be a model or a path; got {type(model_or_path).__name__}.")
    return given(model_or_path)


def mixture_of(source: Given, name: str = "model") -> MoEPreTrainedModel:
    """The encoder, which must be a mixture whose weights are all its own.

    Raises:
        TypeError: for a dense model; ``name`` is the argument's.
        ValueError: for a model with PEFT adapters.
    """
    if not isinstance(source.encoder, MoEPreTrainedModel):
        raise TypeError(
            f"{name} must be a mixture of experts; got {type(source.encoder).__name__}."
        )
    check_no_adapter(source.encoder)
    return source.encoder
