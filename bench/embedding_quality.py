"""What rounding costs in a search: nDCG@10 of questions and their answers, against float32's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_fast.data import Retrieval
from moe_fast.evaluation import Evaluation, compare, evaluate_retrieval

METRIC = "nDCG@10"
Vectors = tuple[Tensor, Tensor]
"""The vectors of the questions and of the answers."""


class Stored:
    """An encoder that returns stored vectors."""

    def __init__(self, texts: Sequence[str], vectors: Sequence[Tensor]) -> None:
        rows = (row for part in vectors for row in part.float().numpy())
        self.vectors = dict(zip(texts, rows, strict=True))

    def encode(self, texts: Sequence[str], **options: object) -> NDArray[np.float32]:
        """Return the texts' vectors."""
        return np.stack([self.vectors[text] for text in texts])


def retrieval_of(pairs: Sequence[tuple[str, str]]) -> Retrieval:
    """Make a search of each different question among the answers, which all differ.

    A question that occurs several times has all its answers as relevant ones.
    """
    queries: dict[str, dict[str, int]] = {}
    for number, (question, _) in enumerate(pairs):
        queries.setdefault(question, {})[f"a{number}"] = 1
    return Retrieval(
        corpus={f"a{number}": answer for number, (_, answer) in enumerate(pairs)},
        queries={f"q{number}": question for number, question in enumerate(queries)},
        qrels={f"q{number}": relevant for number, relevant in enumerate(queries.values())},
    )


def quality(
    pairs: Sequence[tuple[str, str]], exact: Vectors, found: Mapping[str, Vectors]
) -> dict[str, dict[str, float]]:
    """Return figures by candidate: nDCG@10, its difference to float32's, and the 95 % interval.

    Args:
        pairs: questions and answers in the order of all vectors.
        exact: the vectors in float32.
        found: each candidate's vectors.
    """
    retrieval = retrieval_of(pairs)
    texts = [question for question, _ in pairs] + [answer for _, answer in pairs]

    def evaluation(vectors: Vectors) -> Evaluation:
        return evaluate_retrieval(Stored(texts, vectors), retrieval, measures=(METRIC,))

    base = evaluation(exact)
    figures = {}
    for name, vectors in found.items():
        own = evaluation(vectors)
        difference = compare(own, base).differences["all"][METRIC]
        figures[name] = {
            METRIC: own.scores["all"][METRIC].value,
            f"{METRIC} less float32's": difference.value,
            "from": difference.low,
            "to": difference.high,
        }
    return figures
