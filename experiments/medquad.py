"""Compares fine-tuned mixtures on MedQuAD with the pretrained model, TF-IDF and a dense fine-tune.

    python -m experiments.medquad pairs_medquad_question_answer.jsonl.gz

MedQuAD has questions and answers from nine NIH sites, which are the domains. They are split by the
disease that they are about: 4,000 pairs for training, 1,000 other questions and 4,000 other answers
for the search. Three fine-tunes have the same budget, as in :mod:`moe_fast.demo.comparison`. The
results are written to ``medquad.json``, ``medquad.md`` and two pictures.
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
    """The settings of the experiment; most are those of the demo.

    Attributes:
        questions, answers: the numbers of held-out questions and answers.
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
    """Read a command line: return (data, model, folder to write to, settings).

    The first line of ``what`` becomes the description of the command.
    """
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
    """Return the training pairs, and the held-out questions and answers.

    No disease, question or answer is in both. Raises ``ValueError`` if there are too few pairs.
    """
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
    """Collect the first different answers, and the first different questions that they answer.

    Raises ``ValueError`` if there are fewer of them than the settings ask for.
    """
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
