"""Embeds one chunk of the texts of a file, in the main process or in a worker."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from moe_fast.data.texts import TextRow
from moe_fast.encoding.lengths import TruncatedTexts, counted_truncation
from moe_fast.inference.parts import Parts
from moe_fast.inference.text_encoder import TextEncoder


@dataclass(frozen=True)
class Chunk:
    """Consecutive texts of a file.

    Attributes:
        number: the number of the chunk, from 0.
        rows: the texts of the chunk.
    """

    number: int
    rows: list[TextRow]


EmbeddedChunk = tuple[int, TruncatedTexts]
"""The number of texts of an embedded :class:`Chunk`, and which of them were truncated."""


TokenizedChunk = tuple[list[Any] | None, TruncatedTexts]
"""The tokens of a :class:`Chunk`, as `TextEncoder.tokenize` gives them, and what was truncated."""


def tokenize_chunk(encoder: TextEncoder, chunk: Chunk) -> TokenizedChunk:
    """Tokenize the texts of one chunk; errors as `embed_chunk`."""
    with counted_truncation() as truncated:
        return encoder.tokenize([row.text for row in chunk.rows]), truncated


def tokenized_ahead(
    encoder: TextEncoder, chunks: Iterable[Chunk]
) -> Generator[tuple[Chunk, Future[TokenizedChunk]], None, None]:
    """Yield each chunk and its tokens, while a thread tokenizes the chunk after it.

    An error of reading or tokenizing a chunk is raised when this chunk's turn comes. The thread
    ends with the iteration.
    """
    remaining = iter(chunks)
    with ThreadPoolExecutor(1, "moe_fast_tokenize") as pool:

        def start_next() -> tuple[Chunk, Future[TokenizedChunk]] | None:
            chunk = next(remaining, None)
            return None if chunk is None else (chunk, pool.submit(tokenize_chunk, encoder, chunk))

        current = start_next()
        while current is not None:
            following, error = None, None
            try:
                following = start_next()
            except Exception as raised:
                error = raised
            yield current
            if error is not None:
                raise error
            current = following


def embed_chunk(
    encoder: TextEncoder,
    parts: Parts,
    chunk: Chunk,
    tokenized: Future[TokenizedChunk] | None = None,
) -> EmbeddedChunk:
    """Embed the texts of one chunk, and write the vectors and ids to `parts`.

    Args:
        tokenized: the result of `tokenize_chunk`; ``None``: the chunk is tokenized here.

    Raises:
        ValueError: the texts cannot be embedded; the error names the place of the first text.
    """
    texts = [row.text for row in chunk.rows]
    try:
        with counted_truncation() as truncated:
            tokens, cut = (None, TruncatedTexts()) if tokenized is None else tokenized.result()
            truncated.add(cut.num_long, cut.limit)
            vectors = encoder.encode(texts, domains_of_rows(chunk.rows), tokens)
    except ValueError as error:
        raise ValueError(
            f"in the {len(texts)} texts from {chunk.rows[0].where}: {error}"
        ) from error
    parts.write(chunk.number, vectors, [row.id for row in chunk.rows])
    return len(texts), truncated


def domains_of_rows(rows: list[TextRow]) -> list[str] | None:
    """Return the domain of each row; ``None`` if the rows have no domains."""
    return [row.domain for row in rows if row.domain is not None] or None
