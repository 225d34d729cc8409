"""MedQuAD: what a fine-tuned mixture gains over the pretrained model, TF-IDF and a dense fine-tune.

    python -m experiments.medquad pairs_medquad_question_answer.jsonl.gz

Questions and answers from nine NIH sites (the domains), split by the disease they are about: 4,000
pairs to train on; 1,000 other questions, searched among 4,000 other answers. Three fine-tunes with
one budget, as in :mod:`moe_fast.demo.comparison`. Writes ``medquad.json``, ``medquad.md`` and two
pictures.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from datasets import Dataset

from moe_fast.data import Retrieval, read_pairs, split_by
from moe_fast.demo import comparison
from moe_fast.demo.pretrained import MODEL_NAME, pretrained_folder

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings(comparison.Settings):
    """Every number that somebody chose; most are those of the demo.

    Attributes:
        questions, answers: how many are held out.
    """

    train_pairs: int = 4000
    load_balance: float = 0.05
    mutual_information: float = 1.0
    questions: int = 1000
    answers: int = 4000


def main() -> None:
    """Run the experiment from the command line."""
    data, model, output, settings = parse(__doc__ or "", Settings())
    train, test = load(data, settings)
    comparison.compare_variants(train, test, model, output, "medquad", settings)


def parse(what: str, defaults: S) -> tuple[Path, Path, Path, S]:
    """(data, model, folder to write to, settings) that a command line gives."""
    parser = argparse.ArgumentParser(description=what.split("\n")[0])
    parser.add_argument("data", type=Path, help="the pairs: a, b, domain, focus")
    parser.add_argument("--model", type=Path, help=f"a SentenceTransformer (default: {MODEL_NAME})")
    parser.add_argument("--output", type=Path, default=Path("experiments/results"))
    for name, default in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    data, model, output = (arguments.pop(name) for name in ("data", "model", "output"))
    return data, model or pretrained_folder(), output, type(defaults)(**arguments)


def load(path: Path, settings: Settings) -> tuple[Dataset, Retrieval]:
    """(training pairs, held-out questions and answers): no disease, question or answer in both."""
    pairs = read_pairs(path, keep=("focus",))
    pairs = pairs.filter(lambda row: bool(row["focus"]))
    pairs = pairs.map(lambda row: {"disease": row["focus"].casefold()})
    half = split_by(pairs, "disease", fractions={"train": 0.5, "test": 0.5}, seed=settings.seed)
    held_out = {text for column in ("a", "b") for text in half["test"][column]}
    train = half["train"].filter(lambda row: row["a"] not in held_out and row["b"] not in held_out)
    train = train.shuffle(seed=settings.seed)
    if len(train) < settings.train_pairs:
        raise ValueError(f"train_pairs={settings.train_pairs}: there are {len(train)} pairs")
    train = train.select(range(settings.train_pairs)).select_columns(["a", "b", "domain"])
    return train, retrieval_set(half["test"].shuffle(seed=settings.seed), settings)


def retrieval_set(pairs: Dataset, settings: Settings) -> Retrieval:
    """The first different answers, and the first different questions that one of them answers."""
    answers = islice(dict.fromkeys(pairs["b"]), settings.answers)
    corpus = {answer: f"a{number}" for number, answer in enumerate(answers)}
    qrels: dict[str, dict[str, int]] = {}  # question -> {answer's id: 1}
    domain_of: dict[str, str] = {}
    for question, answer, domain in zip(pairs["a"], pairs["b"], pairs["domain"], strict=True):
        domain_of.setdefault(answer, domain)
        if answer in corpus and (question in qrels or len(qrels) < settings.questions):
            qrels.setdefault(question, {})[corpus[answer]] = 1
            domain_of.setdefault(question, domain)
    if len(corpus) < settings.answers or len(qrels) < settings.questions:
        raise ValueError(
            f"questions={settings.questions}, answers={settings.answers}: the held-out half has "
            f"{len(qrels)} and {len(corpus)} different ones"
        )
    questions = {text: f"q{number}" for number, text in enumerate(qrels)}
    return Retrieval(
        corpus={key: text for text, key in corpus.items()},
        queries={key: text for text, key in questions.items()},
        qrels={questions[text]: row for text, row in qrels.items()},
        domains={key: domain_of[text] for text, key in questions.items()},
        corpus_domains={key: domain_of[text] for text, key in corpus.items()},
    )


if __name__ == "__main__":
    main()
