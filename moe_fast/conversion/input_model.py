"""The entry of all conversions: finds the encoder in the input, and returns the same kind of model.

A conversion takes an encoder, bare or with a head, or a model of sentence-transformers, or the path
of either.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_fast.architectures import HEADS
from moe_fast.encoding.loading import load_as_saved
from moe_fast.models.loading import tokenizer_beside
from moe_fast.models.pretrained import MoEPreTrainedModel
from moe_fast.models.quantization import check_not_quantized
from moe_fast.models.saving import check_no_adapter
from moe_fast.ops.checks import check_choice


@dataclass(frozen=True)
class Given:
    """An encoder to be converted, and the model that contains it.

    Attributes:
        encoder: a transformers model.
        pipeline: the ``SentenceTransformer``, ``SparseEncoder`` or ``CrossEncoder`` that contains
            it; ``None``: it is bare.
        path: the path that a bare encoder was loaded from; ``None``: it was in memory.
    """

    encoder: PreTrainedModel
    pipeline: Any = None
    path: str | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the pipeline, or of the bare encoder's folder; ``None``: not known."""
        if self.pipeline is not None:
            return self.pipeline.tokenizer
        return None if self.path is None else tokenizer_beside(self.path)

    def check_domains(self, routing: str, domains: Any) -> None:
        """Raise ``ValueError`` if ``encode`` could not choose an expert by its domain."""
        if self.pipeline is not None and routing == "enforced" and not domains:
            raise ValueError(
                "domains must be given with routing='enforced' for a SentenceTransformer, whose "
                "encode chooses the expert by domain; got none."
            )

    def around(self, encoder: PreTrainedModel) -> Any:
        """A copy of the pipeline with ``encoder`` in it; without a pipeline, ``encoder`` itself."""
        if self.pipeline is None:
            return encoder
        from moe_fast.conversion.pipelines import with_encoder

        return with_encoder(self.pipeline, encoder)


def given(model: Any) -> Given:
    """Find the encoder in a model in memory: an encoder or one of sentence-transformers' models.

    Raises:
        TypeError: for a ``SentenceTransformer`` with several encoders, or with none in its first
            module. Other models are treated as encoders, which the conversion checks.
    """
    if isinstance(model, PreTrainedModel) or not _is_pipeline(model):
        return Given(model)
    from moe_fast.conversion.pipelines import encoder_of

    return Given(encoder_of(model), model)


def _is_pipeline(model: Any) -> bool:
    return hasattr(model, "encode") or hasattr(model, "predict")  # a CrossEncoder has no encode


def loaded(model_or_path: Any, name: str = "model_or_path", *, head: str | None = None) -> Given:
    """As :func:`given`, also for the model in a folder or with a hub id.

    Args:
        model_or_path, name: the argument, and what it is called.
        head: one of :data:`moe_fast.architectures.HEADS`, to be loaded from a path with it.

    Raises:
        TypeError: the argument is neither a path nor a model.
        ValueError: for a ``head`` that there is not, that the model at the path lacks, or that is
            given beside a model in memory, which has its own or none.
        ValueError, OSError: as :func:`moe_fast.encoding.loading.load_as_saved`.
    """
    if head is not None:
        check_choice("head", head, HEADS)
    if isinstance(model_or_path, (str, os.PathLike)):
        path = os.fspath(model_or_path)
        model = load_as_saved(path, head or "")
        return Given(model, path=path) if isinstance(model, PreTrainedModel) else given(model)
    if not isinstance(model_or_path, nn.Module):
        raise TypeError(f"{name} must be a model or a path; got {type(model_or_path).__name__}.")
    if head is not None:
        raise ValueError(
            f"head must be None for a model in memory, which is taken with the head that it has; "
            f"got {head!r} and a {type(model_or_path).__name__}."
        )
    return given(model_or_path)


def mixture_of(source: Given, name: str = "model") -> MoEPreTrainedModel:
    """The encoder, which must be a mixture of experts without PEFT adapters.

    Raises:
        TypeError: the argument, called ``name``, is a dense model.
        ValueError: the model has PEFT adapters, or is quantised.
    """
    if not isinstance(source.encoder, MoEPreTrainedModel):
        raise TypeError(
            f"{name} must be a mixture of experts; got {type(source.encoder).__name__}."
        )
    check_no_adapter(source.encoder)
    check_not_quantized(source.encoder, "converted")
    return source.encoder
