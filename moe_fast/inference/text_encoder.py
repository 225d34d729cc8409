"""Loads a model and embeds texts with it, as settings say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moe_fast.encoding.domains import domains_of
from moe_fast.encoding.encoder import check_one_encoder
from moe_fast.encoding.loading import load_model
from moe_fast.encoding.vectors import encode_texts
from moe_fast.inference.precision import PRECISIONS, Precision
from moe_fast.models.configuration import AUTO
from moe_fast.models.domain_predictor import predictor_of
from moe_fast.ops.checks import check_choice, check_count

FLOATS = ("float32", "float16")


@dataclass(frozen=True)
class EncoderSettings:
    """Settings of how texts are embedded.

    Attributes:
        model: folder or hub id, as in :func:`moe_fast.inference.load_model`.
        domain: the domain of every text, for a mixture that knows domains; "auto": the one that
            it predicts.
        prompt_name: the name of the model's prompt that is put in front of each text.
        batch_size: texts per forward pass.
        dtype: the dtype of the vectors, "float32" or "float16".
        normalize: scale every vector to length 1.
        truncate: cut texts longer than the model's ``max_seq_length``, with a warning that says
            how many. Otherwise such a text is an error.
        device: a device as in PyTorch; ``None``: a GPU if there is one, else the CPU.

    Raises:
        TypeError: `batch_size` is not an int.
        ValueError: `batch_size` is below 1, or `dtype` is unknown.
    """

    model: str
    domain: str | None = None
    prompt_name: str | None = None
    batch_size: int = 32
    dtype: Literal["float32", "float16"] = "float32"
    normalize: bool = False
    truncate: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_choice("dtype", self.dtype, FLOATS)


def with_precision(
    settings: EncoderSettings, precision: Precision | None
) -> tuple[EncoderSettings, Precision]:
    """Return the settings that compute what is stored with a precision, and the precision.

    Args:
        settings: the settings of the caller.
        precision: the precision; ``None``: ``settings.dtype``.

    Raises:
        ValueError: the precision is unknown, or differs from ``dtype="float16"``.
    """
    if precision is None:
        return settings, settings.dtype
    check_choice("precision", precision, PRECISIONS)
    if settings.dtype not in ("float32", precision):
        raise ValueError(
            f"give dtype or precision; got dtype={settings.dtype!r} and precision={precision!r}"
        )
    return replace(settings, dtype="float16" if precision == "float16" else "float32"), precision


class TextEncoder:
    """The model of an :class:`EncoderSettings`, loaded.

    Raises:
        ValueError: the model does not know the domain or the prompt.
        TypeError: the model consists of several encoders.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self.settings = settings
        self.model = load_model(settings.model, device=settings.device)
        check_one_encoder(self.model)
        if settings.prompt_name is not None:
            check_choice("prompt_name", settings.prompt_name, sorted(self.model.prompts))
        self.check_domains([settings.domain])

    def check_domains(self, names: Sequence[str | None]) -> None:
        """Raise ValueError if a name, unless it is None, is not one of the model's domains.

        "auto" is one if the model can predict domains.
        """
        known = domains_of(self.model)
        if AUTO in names and known:
            predictor_of(self.model.transformers_model)
            known = [*known, AUTO]
        for name in names:
            if name is not None and name not in known:
                listed = ", ".join(known) or "it has none"
                raise ValueError(f"domain must be one of the model's ({listed}); got {name!r}")

    def tokenize(self, texts: Sequence[str]) -> list[Any] | None:
        """Tokenize texts for a later call of :meth:`encode`, in any thread.

        Returns:
            What that call takes as `tokens`; ``None`` for models that tokenize while they encode.

        Raises:
            ValueError: a text is too long, unless the settings truncate.
        """
        tokenize = getattr(self.model, "tokenize_ahead", None)
        if tokenize is None:
            return None
        return tokenize(
            texts, truncate=self.settings.truncate, prompt_name=self.settings.prompt_name
        )

    def encode(
        self,
        texts: Sequence[str],
        domains: Sequence[str] | None,
        tokens: Sequence[Any] | None = None,
        batch_size: int | None = None,
    ) -> NDArray[np.floating]:
        """Embed N texts as vectors [N, d], in the settings' dtype.

        Args:
            texts: N texts.
            domains: one domain per text; ``None``: the settings' domain.
            tokens: the result of :meth:`tokenize` for these texts; ``None``: it is done here.
            batch_size: texts per forward pass; ``None``: the settings'.

        Raises:
            ValueError: a text is too long, unless the settings truncate.
            ValueError: a vector has NaN or infinite numbers.
        """
        options: dict[str, Any] = {"prompt_name": self.settings.prompt_name}
        domain = self.settings.domain if domains is None else list(domains)
        if domain is not None:
            options["domain"] = domain
        return encode_texts(
            self.model,
            texts,
            truncate=self.settings.truncate,
            dtype=self.settings.dtype,
            tokens=tokens,
            batch_size=batch_size or self.settings.batch_size,
            normalize_embeddings=self.settings.normalize,
            show_progress_bar=False,
            convert_to_numpy=True,
            **options,
        )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set PyTorch's number of threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
