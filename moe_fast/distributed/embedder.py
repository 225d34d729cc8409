"""Embedder: a picklable callable that adds vectors to a batch of rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_fast.data import checks
from moe_fast.inference.precision import PRECISIONS, Precision, StoredPrecision, needs_ranges
from moe_fast.inference.text_encoder import EncoderSettings, TextEncoder, torch_threads
from moe_fast.inference.vectors import fixed_size_lists
from moe_fast.messages import listed
from moe_fast.ops.checks import check_choice, check_count

_loaded: dict[EncoderSettings, TextEncoder] = {}  # one model per process, for all copies
_lock = threading.Lock()


class Embedder:
    """Embeds the texts of a batch, for ``ray.data.Dataset.map_batches`` and Spark's ``mapInArrow``.

    An instance holds its settings alone, so that it is small when it is pickled. The model is
    loaded by the first batch, once per process.

    Args:
        model: folder or hub id, as in :func:`moe_fast.inference.load_model`. The workers must find
            it too.
        text_column: the column of the texts.
        domain: the column of the texts' domains; or, if the batch has no column of this name, the
            domain of all texts, one of the model's or "auto". ``None``: the model needs none.
        precision: what the vectors are stored as, see :mod:`moe_fast.inference.precision`.
        ranges: [2, d], the least and the greatest value of each dimension; for ``int8`` and
            ``uint8`` only, since a batch does not know those of the corpus.
        output_column: the column of the vectors, which is added or replaced.
        prompt_name: the name of the model's prompt that is put before each text.
        normalize: scale every vector to length 1.
        truncate: cut texts that are too long; otherwise they are an error.
        batch_size: texts per forward pass.
        batch_tokens: instead, the most tokens per forward pass, unless it is one text; mixtures
            only, which compute no padding. Texts of equal length are computed together.
        threads: PyTorch's threads; ``None``: as many as it has.
        device: as in PyTorch; ``None``: a GPU if there is one, else the CPU.

    Raises:
        TypeError, ValueError: an argument is not of the type or not among the values above.
    """

    def __init__(
        self,
        model: str,
        *,
        text_column: str = "text",
        domain: str | None = None,
        precision: Precision = "float32",
        ranges: ArrayLike | None = None,
        output_column: str = "embedding",
        prompt_name: str | None = None,
        normalize: bool = False,
        truncate: bool = False,
        batch_size: int = 32,
        batch_tokens: int | None = None,
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        check_choice("precision", precision, PRECISIONS)
        if needs_ranges(precision) != (ranges is not None):
            raise ValueError(
                f"ranges must be {'given' if ranges is None else 'None'} for "
                f"precision={precision!r}: int8 and uint8 divide the ranges of the dimensions"
            )
        if batch_tokens is not None:
            check_count("batch_tokens", batch_tokens)
        if threads is not None:
            check_count("threads", threads)
        self.settings = EncoderSettings(
            str(model),
            prompt_name=prompt_name,
            batch_size=batch_size,
            dtype="float16" if precision == "float16" else "float32",
            normalize=normalize,
            truncate=truncate,
            device=device,
        )
        self.text_column, self.domain, self.output_column = text_column, domain, output_column
        self.precision = precision
        self.ranges = None if ranges is None else np.asarray(ranges, np.float32)
        self.batch_tokens, self.threads = batch_tokens, threads

    def __call__(self, batch: Any) -> Any:
        """Add the column of vectors to a batch of n rows.

        Args:
            batch: {column: array of n values}, Ray Data's batches by default, or a table or record
                batch of Arrow, such as of ``batch_format="pyarrow"`` and of Spark.

        Returns:
            The same kind of batch with ``output_column``: an array [n, width], in a table lists of
            fixed size, in a record batch lists, since Spark takes no lists of fixed size.

        Raises:
            ValueError: a column is missing, a text is empty or too long, a domain is unknown, or a
                vector is not finite.
        """
        is_dict = isinstance(batch, dict)
        names = list(batch) if is_dict else batch.schema.names
        if self.text_column not in names:
            raise ValueError(
                f"text_column={self.text_column!r} is no column of the batch; it has "
                f"{listed(sorted(names))}"
            )
        domains = _values(batch, self.domain) if self.domain in names else self.domain
        vectors = self.embed(_values(batch, self.text_column), domains)
        stored = StoredPrecision(self.precision, vectors.shape[1], self.ranges).encode(vectors)
        if is_dict:
            return {**batch, self.output_column: stored}
        column = _arrow_column(batch, stored)
        if self.output_column in names:
            place = names.index(self.output_column)
            return batch.set_column(place, self.output_column, column)
        return batch.append_column(self.output_column, column)

    def embed(
        self, texts: Sequence[Any], domains: Sequence[Any] | str | None
    ) -> NDArray[np.floating]:
        """Compute the vectors [n, d] of n texts, before they are stored in fewer bytes.

        Args:
            texts: n texts.
            domains: one name per text, one for all, or None.

        Raises:
            ValueError: see the call of an instance.
        """
        texts = [checks.text(text, self.text_column, f"row {i}") for i, text in enumerate(texts)]
        encoder = self._encoder()
        if isinstance(domains, str):
            domains = [domains] * len(texts)
        if domains is not None:
            column = str(self.domain)
            domains = [checks.text(d, column, f"row {i}") for i, d in enumerate(domains)]
            encoder.check_domains(sorted(set(domains)))
        if not texts:
            dimension = encoder.model.get_embedding_dimension()
            return np.zeros((0, dimension), self.settings.dtype)
        with nullcontext() if self.threads is None else torch_threads(self.threads):
            if self.batch_tokens is None:
                return encoder.encode(texts, domains)
            return self._encode_by_tokens(encoder, texts, domains, self.batch_tokens)

    def _encode_by_tokens(
        self,
        encoder: TextEncoder,
        texts: list[str],
        domains: Sequence[str] | None,
        batch_tokens: int,
    ) -> NDArray[np.floating]:
        tokens = encoder.tokenize(texts)
        if tokens is None:
            raise ValueError("batch_tokens is for mixtures; give batch_size for a dense model")
        order: list[int] = []
        found = []
        for places in _by_tokens([len(text.ids) for text in tokens], batch_tokens):
            order += places
            found.append(
                encoder.encode(
                    [texts[i] for i in places],
                    None if domains is None else [domains[i] for i in places],
                    [tokens[i] for i in places],
                    batch_size=len(places),
                )
            )
        vectors = np.concatenate(found)
        return vectors[np.argsort(order)]

    def _encoder(self) -> TextEncoder:
        with _lock:
            if self.settings not in _loaded:
                _loaded.clear()  # one model at a time
                _loaded[self.settings] = TextEncoder(self.settings)
            return _loaded[self.settings]


def _arrow_column(batch: Any, stored: NDArray[Any]) -> Any:
    import pyarrow as pa

    column = fixed_size_lists(stored)
    return (
        column.cast(pa.list_(column.type.value_type))
        if isinstance(batch, pa.RecordBatch)
        else column
    )


def _values(batch: Any, column: Any) -> Sequence[Any]:
    if not isinstance(batch, dict):
        return batch.column(column).to_pylist()
    values = batch[column]
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


def _by_tokens(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Divide texts, longest first, into batches of at most `batch_tokens` tokens."""
    batch: list[int] = []
    tokens = 0
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and tokens + lengths[place] > batch_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(place)
        tokens += lengths[place]
    if batch:
        yield batch
