"""Embeds a corpus on a cluster: a callable for Ray Data and Spark, and a whole job with Ray.

:class:`Embedder` needs the extra ``train``, :func:`embed_corpus` also ``ray``.
"""

from __future__ import annotations

from moe_fast.distributed.corpus import embed_corpus
from moe_fast.distributed.embedder import Embedder

__all__ = ["Embedder", "embed_corpus"]
