"""nDCG@10 of every question, searched in the three ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.claims.arms import Setup, Trained
from experiments.claims.data import Data, of_domain
from experiments.claims.settings import PLACES
from moe_fast.data import Retrieval
from moe_fast.evaluation.ir_metrics import query_scores
from moe_fast.evaluation.nearest import search

DEPTH = 10


def predicted_domains(setup: Setup) -> tuple[list[str], dict[str, float]]:
    """The domains that a mixture's predictor finds for the held-out questions.

    It is fitted to the questions and documents of the training pairs.

    Returns:
        (a name per question, the accuracies on held-out questions and documents).
    """
    data = setup.data
    texts = [*data.train["a"], *data.train["b"]]
    model = setup.enforced()
    model.fit_domain_predictor(texts, [*data.train["domain"]] * 2, truncate=True)
    found, accuracy = {}, {}
    for kind, part, names in (
        ("questions", data.test.queries, data.test.domains),
        ("documents", data.test.corpus, data.test.corpus_domains),
    ):
        assert names is not None
        found[kind] = model.predict_domain(list(part.values()), truncate=True).domains
        right = [a == b for a, b in zip(found[kind], names.values(), strict=True)]
        accuracy[kind] = float(np.mean(right))
    return found["questions"], accuracy


def measure(
    trained: Trained, data: Data, predicted: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """nDCG@10 of each question, [Q], by the set of documents searched.

    The domain of a document is known in all three; in the last, that of a question is predicted.
    """
    test = data.test
    assert test.domains is not None and test.corpus_domains is not None
    known = list(test.domains.values())
    of_documents = list(test.corpus_domains.values())
    questions = list(test.queries.values())
    documents = trained.encode(list(test.corpus.values()), of_documents)
    vectors = trained.encode(questions, known)
    own = np.zeros((len(questions), DEPTH), np.int64)
    for domain in data.domains:
        rows, columns = of_domain(known, domain), np.array(of_domain(of_documents, domain))
        if rows and len(columns):
            _, hits = search(vectors[rows], documents[columns], k=DEPTH)
            # fewer documents than ranks: the last again, which cannot be found a second time
            padded = np.pad(columns[hits], ((0, 0), (0, DEPTH - hits.shape[1])), mode="edge")
            own[rows] = padded
    everything = search(vectors, documents, k=DEPTH)[1]
    unknown = everything
    if trained.knows_domains:
        unknown = search(trained.encode(questions, predicted), documents, k=DEPTH)[1]
    found = (own, everything, unknown)
    return {place: _ndcg(hits, test) for place, hits in zip(PLACES, found, strict=True)}


def _ndcg(hits: NDArray[np.int64], test: Retrieval) -> NDArray[np.float32]:
    """nDCG@10 of each question, from the places of its hits in the corpus, best first."""
    ids = list(test.corpus)
    run: dict[str, Mapping[str, float]] = {}
    for query, places in zip(test.queries, hits.tolist(), strict=True):
        best_first = dict.fromkeys(ids[place] for place in places)
        run[query] = {key: float(DEPTH - rank) for rank, key in enumerate(best_first)}
    qrels: dict[str, Any] = {query: test.qrels[query] for query in test.queries}
    return query_scores(run, qrels, [f"nDCG@{DEPTH}"])[f"nDCG@{DEPTH}"].astype(np.float32)
