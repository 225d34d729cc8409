"""Embedding the held-out pairs with each system, and scoring what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm.auto import tqdm

from moe_fast.demo.docstrings import DOMAINS, DocstringPair
from moe_fast.demo.settings import DemoSettings
from moe_fast.demo.variants import is_enforced, is_mixture
from moe_fast.evaluation import expert_usage, retrieval_scores

_ENCODE_CHUNK = 128
OWN_DOMAIN = "nDCG@10 in own domain"


@dataclass
class System:
    """One row of the table.

    Attributes:
        name: what it is called.
        scores: {measure: [Q]}, every held-out query's.
        active_parameters, total_parameters: None for TF-IDF.
        train_pairs: 0 for what is not trained here.
        train_seconds: None likewise.
        losses: (training pairs seen, loss).
        usage: [domain, layer, expert] share of tokens, of mixtures.
    """

    name: str
    scores: dict[str, NDArray[np.float64]]
    active_parameters: int | None = None
    total_parameters: int | None = None
    train_pairs: int = 0
    train_seconds: float | None = None
    losses: list[tuple[float, float]] = field(default_factory=list)
    usage: NDArray[np.float64] | None = None


def embed(
    model: SentenceTransformer, texts: Sequence[str], domains: Sequence[str], max_tokens: int
) -> NDArray[np.float32]:
    """Unit vectors [N, d]; longer texts are cut. Only enforced routing is told the domains."""
    model.max_seq_length = max_tokens
    vectors = []
    for start in tqdm(range(0, len(texts), _ENCODE_CHUNK), desc="embedding", unit="chunk"):
        chunk = slice(start, start + _ENCODE_CHUNK)
        options: dict[str, Any] = {"truncate": True} if is_mixture(model) else {}
        if is_enforced(model):
            options["domain"] = list(domains[chunk])
        vectors.append(
            model.encode(
                list(texts[chunk]),
                normalize_embeddings=True,
                show_progress_bar=False,
                **options,
            )
        )
    return np.concatenate(vectors)


def embed_pairs(
    model: SentenceTransformer, pairs: Sequence[DocstringPair], settings: DemoSettings
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(query vectors, document vectors), each [N, d], row by row."""
    domains = [pair.domain for pair in pairs]
    queries = embed(model, [pair.query for pair in pairs], domains, settings.query_tokens)
    documents = embed(model, [pair.document for pair in pairs], domains, settings.document_tokens)
    return queries, documents


def score(queries: Any, documents: Any, domains: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Each query against all documents; its own, in the same row, is the one relevant.

    ``OWN_DOMAIN`` is nDCG@10 against the documents of the query's own domain alone. A system that
    is told the domains cannot gain there by keeping domains apart.
    """
    scores = retrieval_scores(queries, documents, [{row: 1} for row in range(queries.shape[0])])
    own = np.empty(queries.shape[0])
    for domain in dict.fromkeys(domains):
        rows = [row for row, name in enumerate(domains) if name == domain]
        relevant = [{i: 1} for i in range(len(rows))]
        own[rows] = retrieval_scores(queries[rows], documents[rows], relevant)["nDCG@10"]
    return {**scores, OWN_DOMAIN: own}


def tfidf_baseline(pairs: Sequence[DocstringPair]) -> System:
    """Words in common, weighted by rarity among the held-out documents (which it reads uncut)."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    documents = vectorizer.fit_transform([pair.document for pair in pairs])
    queries = vectorizer.transform([pair.query for pair in pairs])
    return System("TF-IDF", score(queries, documents, [pair.domain for pair in pairs]))


def measure_usage(
    model: SentenceTransformer, pairs: Sequence[DocstringPair], settings: DemoSettings
) -> NDArray[np.float64]:
    """Where the tokens of the first held-out documents go: [domain, layer, expert]."""
    model.max_seq_length = settings.document_tokens
    share = settings.usage_documents // len(DOMAINS)
    chosen = [p for domain in DOMAINS for p in [q for q in pairs if q.domain == domain][:share]]
    return expert_usage(
        model,
        [pair.document for pair in chosen],
        [pair.domain for pair in chosen],
        order=DOMAINS,
        pass_domain=is_enforced(model),
        truncate=True,
        show_progress_bar=False,
    )
