"""Embeds files of texts with trained models, and searches in the embeddings.

The extra ``train`` (sentence-transformers, pyarrow) is needed, and for search ``search`` (faiss).
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
