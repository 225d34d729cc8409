"""A chunk of the texts of a file, and its embedding, in whichever process."""

from __future__ import annotations

from dataclasses import dataclass

from moe_fast.data.texts import TextRow
from moe_fast.encoding.lengths import TruncatedTexts, counted_truncation
from moe_fast.inference.parts import Parts
from moe_fast.inference.text_encoder import TextEncoder


@dataclass(frozen=True)
class Chunk:
    """A run of texts.

    Attributes:
        number: of the chunk, from 0.
        rows: its texts.
    """

    number: int
    rows: list[TextRow]


EmbeddedChunk = tuple[int, TruncatedTexts]
"""What became of a :class:`Chunk`: its number of texts, and of those that were cut."""


def embed_chunk(encoder: TextEncoder, parts: Parts, chunk: Chunk) -> EmbeddedChunk:
    """Compute and write one chunk."""
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
    """The domain of each row; ``None`` where the file was not asked for them."""
    return [row.domain for row in rows if row.domain is not None] or None
