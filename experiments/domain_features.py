"""From what can a mixture tell a text's domain? Accuracy and cost of four features, on MedQuAD.

    python -m experiments.domain_features FOLDER

A logistic regression of scikit-learn is fitted to each feature of the questions and documents of
the training pairs; how strongly it is penalised is chosen on a fifth of the pairs, which then train
too. The accuracy is that on held-out questions and documents about other diseases. The cost is the
time that it takes to compute the feature and the prediction, as a share of the time of ``encode``
on the same held-out texts. The results are written to ``domain_features.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.claims.arms import Setup
from experiments.claims.data import SETS, Data, load
from experiments.claims.records import processor
from experiments.claims.settings import Settings
from moe_fast.demo.pretrained import go_offline, pretrained_folder
from moe_fast.files import write_text


@dataclass(frozen=True)
class Feature:
    """A way to turn texts into the rows of a matrix.

    Attributes:
        compute: of the mixture and N texts, [N, F], dense or sparse.
        inverse_penalties: scikit-learn's C, to choose from.
        scaled: whether columns are scaled to a deviation of 1.
    """

    compute: Callable[[Any, Sequence[str]], Any]
    inverse_penalties: tuple[float, ...]
    scaled: bool = True


def tokens_of(model: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text, cut as ``encode`` cuts them."""
    return model.tokenizer(list(texts), truncation=True, max_length=model.max_seq_length)[
        "input_ids"
    ]


def token_shares(model: Any, texts: Sequence[str]) -> Any:
    """The share of each token of the vocabulary among the text's tokens."""
    rows = tokens_of(model, texts)
    starts = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.full(len(row), 1 / len(row)) for row in rows])
    size = model.transformers_model.config.vocab_size
    shares = sparse.csr_matrix((values, np.concatenate(rows), starts), (len(rows), size))
    shares.sum_duplicates()
    return shares


def mean_words(model: Any, texts: Sequence[str]) -> Any:
    """The mean of the word embeddings."""
    rows = tokens_of(model, texts)
    starts = torch.tensor(np.cumsum([0, *map(len, rows)])[:-1])
    words = model.transformers_model.get_input_embeddings().weight.detach()
    flat = torch.tensor(np.concatenate(rows))
    return torch.nn.functional.embedding_bag(flat, words, starts, mode="mean").numpy()


def mean_states(model: Any, texts: Sequence[str]) -> Any:
    """The mean of the states before the first expert: of the first layer's attention."""
    encoder = model.transformers_model
    rows = tokens_of(model, texts)
    order = np.argsort([len(row) for row in rows])
    found = np.full((len(rows), encoder.config.hidden_size), np.nan, np.float32)
    layer = encoder.encoder.layer[0].attention
    for start in range(0, len(rows), 64):
        places = order[start : start + 64]
        batch = model.tokenizer.pad({"input_ids": [rows[i] for i in places]}, return_tensors="pt")
        mask = batch["attention_mask"]
        with torch.inference_mode():
            states = encoder.embeddings(input_ids=batch["input_ids"])
            hidden = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None, :]
            states = layer(states, attention_mask=hidden)[0]
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found[places] = means.numpy()
    return found


def full_pass(model: Any, texts: Sequence[str]) -> Any:
    """The embeddings that one of the experts gives, without knowing the domain."""
    options = {"truncate": True, "show_progress_bar": False, "batch_size": 64}
    return model.encode(list(texts), domain=model.transformers_model.config.domains[0], **options)


FEATURES = {
    "word embeddings, mean": Feature(mean_words, (0.003, 0.01, 0.03)),
    "token shares": Feature(token_shares, (100.0, 300.0), scaled=False),
    "states before the first expert, mean": Feature(mean_states, (0.003, 0.01, 0.03)),
    "a pass through one expert": Feature(full_pass, (0.003, 0.01, 0.03)),
}


def measure(model: Any, data: Data) -> dict[str, dict[str, float]]:
    """By feature: the accuracies, the cost and the penalty."""
    assert data.test.domains is not None and data.test.corpus_domains is not None
    texts = [text for pair in zip(data.train["a"], data.train["b"], strict=True) for text in pair]
    domains = [domain for domain in data.train["domain"] for _ in range(2)]
    questions = list(data.test.queries.values())
    documents = list(data.test.corpus.values())
    full_pass(model, documents[:64])
    seconds = {"encode": _seconds(lambda: full_pass(model, questions + documents))}
    found = {}
    for name, feature in FEATURES.items():
        rows = feature.compute(model, texts)
        classifier, penalty = _fitted(feature, rows, domains)
        of_questions = feature.compute(model, questions)
        of_documents = feature.compute(model, documents)
        seconds[name] = _seconds(
            lambda f=feature, c=classifier: c.predict(f.compute(model, questions + documents))
        )
        found[name] = {
            "questions": classifier.score(of_questions, list(data.test.domains.values())),
            "documents": classifier.score(of_documents, list(data.test.corpus_domains.values())),
            "cost": seconds[name] / seconds["encode"],
            "inverse penalty": penalty,
        }
        print(name, found[name], flush=True)
    return found


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _fitted(feature: Feature, rows: Any, domains: list[str]) -> tuple[Any, float]:
    """The classifier with the penalty that is best on the last fifth, and its inverse penalty."""
    cut = 4 * len(domains) // 5

    def fit(penalty: float, end: int) -> Any:
        parts = [StandardScaler()] if feature.scaled else []
        classifier = make_pipeline(*parts, LogisticRegression(C=penalty, max_iter=200))
        return classifier.fit(rows[:end], domains[:end])

    scores = {c: fit(c, cut).score(rows[cut:], domains[cut:]) for c in feature.inverse_penalties}
    best = max(scores, key=lambda c: scores[c])
    return fit(best, len(domains)), best


def main() -> None:
    """Run the experiment from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("experiments/results"))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=1000)
    given = parser.parse_args()
    go_offline()
    source = replace(SETS["medquad"][0], train_pairs=given.pairs, documents=given.documents)
    data = load("medquad", given.folder, 0, {"medquad": (source,)})
    settings = Settings(precision="float32")
    model = Setup(pretrained_folder(), data, settings).enforced()
    found = measure(model, data)
    record = {
        "command": f"python -m experiments.domain_features FOLDER --pairs {given.pairs} "
        f"--documents {given.documents}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "pairs": len(data.train),
        "questions": len(data.test.queries),
        "documents": len(data.test.corpus),
        "settings": asdict(settings),
        "features": found,
    }
    lines = ["| feature | accuracy, questions | documents | cost |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {f['questions']:.3f} | {f['documents']:.3f} | {f['cost']:.1%} |"
        for name, f in found.items()
    ]
    write_text(given.output / "domain_features.json", json.dumps(record, indent=1) + "\n")
    write_text(given.output / "domain_features.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
