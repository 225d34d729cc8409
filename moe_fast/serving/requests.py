"""What a request for embeddings may say, and what is answered: OpenAI's fields, and ours."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

INPUT_FORMS = (
    "a text, a list of texts, the token ids of a text, or a list of lists of token ids; none empty "
    "but a text"
)

Ids = Annotated[list[int], Field(min_length=1)]


class EmbeddingRequest(BaseModel):
    """A request for embeddings; fields that are not listed are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(description="The name of the model, as /v1/models lists it.")
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1)]
    ) = Field(
        description=f"What to embed: {INPUT_FORMS}. Token ids are those of the model's own "
        "tokenizer, with its special tokens."
    )
    dimensions: int | None = Field(
        None, description="Give the first so many elements of each vector, of length 1 again."
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or the base64 of little-endian float32 numbers."
    )
    user: str | None = Field(None, description="The end user, as OpenAI has it; not used.")
    domain: str | list[str] | None = Field(
        None, description="The domain of all texts, or one for each; auto: the one predicted."
    )
    prompt_name: str | None = Field(
        None, description="The model's prompt to put before each text; not with token ids."
    )
    truncate: bool | None = Field(
        None, description="Cut texts that are too long, which are an error otherwise."
    )


class Embedding(BaseModel):
    """One vector of an answer."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """The number of tokens, special ones included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The answer to a request for embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorDetails(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The answer to a request that was refused, or that failed."""

    error: ErrorDetails


class ModelEntry(BaseModel):
    """A model that the server offers."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    dimensions: int
    max_tokens: int | None
    domains: list[str]
    prompts: list[str]


class ModelList(BaseModel):
    """The models that the server offers."""

    object: Literal["list"]
    data: list[ModelEntry]


def answer(
    vectors: NDArray[np.float32], model: str, tokens: int, encoding_format: str
) -> dict[str, Any]:
    """An :class:`EmbeddingResponse` of vectors [N, d], for a JSON library that takes arrays."""
    rows: Sequence[Any] = list(np.ascontiguousarray(vectors, "<f4"))
    if encoding_format == "base64":
        rows = [base64.b64encode(row.tobytes()).decode() for row in rows]
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
