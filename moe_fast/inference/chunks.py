"""Embeds one chunk of the texts of a file, in the main process or in a worker."""

from __future__ import annotations

from dataclasses import dataclass

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


def embed_chunk(encoder: TextEncoder, parts: Parts, chunk: Chunk) -> EmbeddedChunk:
    """Embed the texts of one chunk, and write the vectors and ids to `parts`.

    Raises:
        ValueError: the texts cannot be embedded; the error names the place of the first text.
    """
    texts = [row.text for row in chunk.rows]
    try:
        with counted_truncation() as truncated:
            vectors = encoder.encode(texts, domains_of_rows(chunk.rows))
    except ValueError as error:
        raise ValueError(
            f"in the {len(texts)} texts from {chunk.rows[0].where}: {error}"
        ) from error
    parts.write(chunk.number, vectors, [row.id for row in chunk.rows])
    return len(texts), truncated


def domains_of_rows(rows: list[TextRow]) -> list[str] | None:
    """Return the domain of each row; ``None`` if the rows have no domains."""
    return [row.domain for row in rows if row.domain is not None] or None
