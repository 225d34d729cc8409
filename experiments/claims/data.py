"""The data sets: training pairs and held-out questions and documents, split by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from moe_fast.data import Retrieval, read_pairs, split_by

MEDQUAD = "pairs_medquad_question_answer.jsonl.gz"
ABSTRACTS = "pairs_medical_abstracts_title_body.jsonl.gz"
PUBMEDQA = "pairs_pubmedqa_question_abstract.jsonl.gz"


@dataclass(frozen=True)
class Source:
    """A file of pairs, or a part of it.

    Attributes:
        file: its name.
        train_pairs: how many pairs are trained on.
        documents: how many held-out documents are searched, at most.
        group: the column that says which pairs are about the same thing, and are never split.
        domain: the domain of all pairs; ``None``: the file names each pair's.
        most: the largest number of training pairs by domain; ``train_pairs`` is then the number of
            every other domain's, and ``documents`` a number for each domain.
    """

    file: str
    train_pairs: int
    documents: int
    group: str = "b"
    domain: str | None = None
    most: Mapping[str, int] | None = None


SIZES = (20, 50, 100, 300)
"""The numbers of training pairs that a domain is cut down to."""

CUT = ("digestive_kidney", "neuro", "health_topics", "senior", "heart_lung_blood", "cancer")


def with_small_domains(rotation: int) -> Source:
    """MedQuAD with four of its nine domains cut down to 20, 50, 100 and 300 pairs."""
    names = [CUT[(2 * rotation + i) % len(CUT)] for i in range(len(SIZES))]
    return Source(MEDQUAD, 600, 500, "focus", most=dict(zip(names, SIZES, strict=True)))


SETS: dict[str, tuple[Source, ...]] = {
    "medquad": (Source(MEDQUAD, 4000, 4000, "focus"),),
    "abstracts": (Source(ABSTRACTS, 1300, 2000),),
    "far": (  # three equal domains
        Source(MEDQUAD, 450, 1000, "focus", "questions about health"),
        Source(ABSTRACTS, 450, 1000, "b", "titles of abstracts"),
        Source(PUBMEDQA, 450, 1000, "b", "research questions"),
    ),
    **{f"small{rotation}": (with_small_domains(rotation),) for rotation in range(3)},
}


@dataclass(frozen=True)
class Data:
    """What a cell is trained and measured on.

    Attributes:
        train: columns a, b and domain.
        test: the held-out questions and documents, with their domains.
        groups: by question id, a name of what it is about: questions of a group are not
            independent.
    """

    train: Dataset
    test: Retrieval
    groups: dict[str, str]

    @property
    def domains(self) -> list[str]:
        """The names of the domains, sorted."""
        return sorted(set(self.train["domain"]))


def load(name: str, folder: Path, seed: int, sets: dict[str, tuple[Source, ...]] = SETS) -> Data:
    """Load a data set.

    Half of the groups are held out. No group, question or document is on both sides.

    Raises:
        ValueError: a file has too few pairs.
    """
    trains, tests = [], []
    for source in sets[name]:
        train, test = _split(source, folder, seed)
        trains.append(train)
        tests.append(test)
    pairs = concatenate_datasets(tests)
    kept = pairs
    if all(source.most is None for source in sets[name]):
        kept = _first_documents(pairs, sum(source.documents for source in sets[name]))
    test, groups = _retrieval(kept)
    held_out = {text for column in ("a", "b") for text in pairs[column]}
    train = concatenate_datasets(trains)
    assert not held_out & {text for column in ("a", "b") for text in train[column]}
    return Data(train.select_columns(["a", "b", "domain"]), test, groups)


def _split(source: Source, folder: Path, seed: int) -> tuple[Dataset, Dataset]:
    """The training pairs of one source, and its held-out pairs, shuffled."""
    pairs = read_pairs(folder / source.file, keep=(source.group,) if source.group != "b" else ())
    pairs = pairs.filter(lambda row: bool(row[source.group]))
    pairs = pairs.map(lambda row: {"group": row[source.group].casefold()})
    if source.domain is not None:
        pairs = pairs.map(lambda row: {"domain": source.domain})
    half = split_by(pairs, "group", fractions={"train": 0.5, "test": 0.5}, seed=seed)
    held_out = {text for column in ("a", "b") for text in half["test"][column]}
    train = half["train"].filter(lambda row: row["a"] not in held_out and row["b"] not in held_out)
    columns = ["a", "b", "domain", "group"]
    if source.most is not None:
        train, test = train.shuffle(seed=seed), half["test"].shuffle(seed=seed)
        return (
            _most_per_domain(train, source.most, source.train_pairs).select_columns(columns),
            _documents_per_domain(test, source.documents).select_columns(columns),
        )
    if len(train) < source.train_pairs:
        raise ValueError(f"{source.file}: train_pairs={source.train_pairs}, of {len(train)}")
    train = train.shuffle(seed=seed).select(range(source.train_pairs)).select_columns(columns)
    test = half["test"].shuffle(seed=seed).select_columns(columns)
    if source.domain is not None:  # every source is one domain, of equal size
        test = _first_documents(test, source.documents)
    return train, test


def _most_per_domain(pairs: Dataset, most: Mapping[str, int], others: int) -> Dataset:
    """The first pairs of each domain, as many as ``most`` says, or ``others``."""
    domains, rows = pairs["domain"], []
    for domain in sorted(set(domains)):
        rows += of_domain(domains, domain)[: most.get(domain, others)]
        if domain in most and domains.count(domain) < most[domain]:
            raise ValueError(f"{domain} has {domains.count(domain)} pairs; {most[domain]} wanted")
    return pairs.select(sorted(rows))


def _documents_per_domain(pairs: Dataset, count: int) -> Dataset:
    """The pairs whose document is among the first ``count`` different ones of its domain."""
    parts = []
    for domain in sorted(set(pairs["domain"])):
        own = pairs.select(of_domain(pairs["domain"], domain))
        parts.append(_first_documents(own, count))
    return concatenate_datasets(parts)


def _first_documents(pairs: Dataset, count: int) -> Dataset:
    """The pairs whose document is among the first ``count`` different ones."""
    kept = set(list(dict.fromkeys(pairs["b"]))[:count])
    return pairs.select([i for i, text in enumerate(pairs["b"]) if text in kept])


def _retrieval(pairs: Dataset) -> tuple[Retrieval, dict[str, str]]:
    """All documents, all questions, and by question id its group."""
    corpus = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(pairs["b"]))}
    queries = {text: f"q{i}" for i, text in enumerate(dict.fromkeys(pairs["a"]))}
    qrels: dict[str, dict[str, int]] = {}
    domain_of: dict[str, str] = {}
    groups: dict[str, str] = {}
    for row in pairs:
        query, document = queries[row["a"]], corpus[row["b"]]
        qrels.setdefault(query, {})[document] = 1
        for key in (query, document):
            domain_of.setdefault(key, row["domain"])
        groups.setdefault(query, row["group"])
    return (
        Retrieval(
            corpus={key: text for text, key in corpus.items()},
            queries={key: text for text, key in queries.items()},
            qrels=qrels,
            domains={key: domain_of[key] for key in queries.values()},
            corpus_domains={key: domain_of[key] for key in corpus.values()},
        ),
        groups,
    )


def in_batches(train: Dataset, batch_size: int, seed: int) -> Dataset:
    """The pairs in the order of training: batches with evenly mixed domains."""
    from moe_fast.training import DomainBatchSampler

    sampler = DomainBatchSampler(train, batch_size, drop_last=False, seed=seed)
    return train.select([row for batch in sampler for row in batch])


def of_domain(names: Sequence[str], domain: str) -> list[int]:
    """The places of a domain in a list of domains."""
    return [place for place, name in enumerate(names) if name == domain]
