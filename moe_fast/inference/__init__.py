"""Using trained models on files: embeddings of texts in bulk, and search in them.

Needs the extras ``train`` (sentence-transformers, pyarrow) and, for search, ``search`` (faiss).
"""

from __future__ import annotations

from moe_fast.encoding.loading import load_model
from moe_fast.inference.embed import EmbeddedFile, embed_file
from moe_fast.inference.index import build_index, load_index, save_index, search_index
from moe_fast.inference.text_encoder import EncoderSettings
from moe_fast.inference.vectors import open_vectors

__all__ = [
    "EmbeddedFile",
    "EncoderSettings",
    "build_index",
    "embed_file",
    "load_index",
    "load_model",
    "open_vectors",
    "save_index",
    "search_index",
]
