"""Question-and-answer pairs from the API documentation inside the installed packages.

Every machine that can run the demo already holds a few thousand short technical texts: the
docstrings of NumPy, SciPy, scikit-learn, PyTorch and the standard library. They are read from the
source files; nothing is imported. One public function, class or method gives one pair: its query is
the docstring's first sentence, its document the rest. The object's own name would give the answer
away, so it is hidden in both texts.

All pairs of a file go to the same split, and texts that are equal once the names are hidden give
one pair, so that none can stand in the training split and have its twin in the held-out one. The
result depends on the packages' versions and the seed alone.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from datasets import Dataset

from moe_fast.data import Retrieval

PACKAGES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "pytorch": "torch",
    "stdlib": None,
}
"""The package of each domain; None is the standard library."""
DOMAINS: tuple[str, ...] = tuple(PACKAGES)
HIDDEN_NAME = "something"  # one token in every vocabulary, and grammatical where a name stood
QUERY_WORDS = range(3, 41)
MIN_DOCUMENT_WORDS, MAX_DOCUMENT_WORDS = 12, 160
_NOT_PUBLIC = re.compile(r"^_|^(tests?|testing|conftest|setup|version|externals|site-packages)$")
_MARKUP = re.compile(r":[\w:+-]+:(?=`)|\.\. +[\w:-]+::|([-=~^*#+])\1{2,}|`|>>>")
_SENTENCE = re.compile(r".*?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)(?<!cf)[.!?](?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class DocstringPair:
    """One object's docstring, cut in two.

    Attributes:
        name: of the object within its file, such as ``Generator.normal``.
        file: the source file, which decides the split.
        domain: one of ``DOMAINS``.
        query: first sentence, the name hidden.
        document: the rest, the name hidden.
    """

    name: str
    file: str
    domain: str
    query: str
    document: str


def source_files(domain: str) -> Iterator[Path]:
    """The public modules of a domain, sorted."""
    package = PACKAGES[domain]
    folder = Path(sysconfig.get_path("stdlib"))
    if package is not None:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"the demo reads the documentation of {package}: not installed")
        folder = Path(spec.origin).parent
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not any(_NOT_PUBLIC.match(part) for part in parts if part != "__init__"):
            yield path


def documented(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, docstring) of the public functions, classes and methods below ``node``."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if child.name.startswith("_"):
            continue
        text = ast.get_docstring(child)
        if text and "deprecated" not in text[:400].lower():
            yield prefix + child.name, text
        if isinstance(child, ast.ClassDef):
            yield from documented(child, f"{child.name}.")


def make_pair(name: str, file: str, domain: str, docstring: str) -> DocstringPair | None:
    """Cut a docstring into query and document; None if either is too short or too long."""
    text = " ".join(_MARKUP.sub(" ", inspect.cleandoc(docstring)).split())
    words = "|".join(map(re.escape, name.split(".")))
    text = re.sub(rf"(?<![\w.])(?:\w+\.)*(?:{words})\b", HIDDEN_NAME, text, flags=re.IGNORECASE)
    sentence = _SENTENCE.match(text)
    query = sentence.group() if sentence else text
    document = text[len(query) :].split()[:MAX_DOCUMENT_WORDS]
    if len(query.split()) not in QUERY_WORDS or len(document) < MIN_DOCUMENT_WORDS:
        return None
    return DocstringPair(name, file, domain, query, " ".join(document))


def read_pairs(domain: str) -> list[DocstringPair]:
    """The pairs of one domain; of equal queries or documents the first alone."""
    found: list[DocstringPair] = []
    seen: set[str] = set()
    for path in source_files(domain):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of others' invalid escapes
            try:
                tree = ast.parse(path.read_bytes())
            except SyntaxError:  # a template, or for another version of Python
                continue
        for name, text in documented(tree):
            pair = make_pair(name, str(path), domain, text)
            if pair is not None and not seen & (texts := {pair.query, pair.document}):
                seen |= texts
                found.append(pair)
    return found


def split_pairs(
    pairs: dict[str, list[DocstringPair]], train_pairs: int, held_out_pairs: int, seed: int
) -> tuple[Dataset, Retrieval]:
    """Training pairs, and held-out ones whose queries are searched among their documents.

    Args:
        pairs: by domain.
        train_pairs, held_out_pairs: over all domains, of which each gives the same share.
        seed: of the choice and of the order.

    Raises:
        ValueError: a domain has too few pairs.
    """
    train: list[DocstringPair] = []
    test: list[DocstringPair] = []
    draw = random.Random(seed)
    for domain, found in pairs.items():
        shares = held_out_pairs // len(pairs), train_pairs // len(pairs)
        files = sorted({pair.file for pair in found})
        draw.shuffle(files)
        place = {file: number for number, file in enumerate(files)}
        ordered = sorted(found, key=lambda pair: place[pair.file])
        held_out = ordered[: shares[0]]
        rest = [pair for pair in ordered if pair.file not in {p.file for p in held_out}]
        if min(shares) < 1 or len(held_out) < shares[0] or len(rest) < shares[1]:
            raise ValueError(
                f"{held_out_pairs} held-out and {train_pairs} training pairs: {domain!r} must give "
                f"{shares[0]} and {shares[1]} (at least 1) of its {len(found)}, from other files"
            )
        test += held_out
        train += draw.sample(rest, shares[1])
    draw.shuffle(train)
    keys = [f"{pair.domain}: {pair.name} #{number}" for number, pair in enumerate(test)]
    columns = {
        "query": [pair.query for pair in train],
        "document": [pair.document for pair in train],
        "domain": [pair.domain for pair in train],
    }
    domains = {key: pair.domain for key, pair in zip(keys, test, strict=True)}
    return Dataset.from_dict(columns), Retrieval(
        corpus={key: pair.document for key, pair in zip(keys, test, strict=True)},
        queries={f"? {key}": pair.query for key, pair in zip(keys, test, strict=True)},
        qrels={f"? {key}": {key: 1} for key in keys},
        domains={f"? {key}": domain for key, domain in domains.items()},
        corpus_domains=domains,
    )
