"""Finds the files of a retrieval set in a folder, by the layout in which it was published.

- BEIR: ``corpus.jsonl``, ``queries.jsonl``, ``qrels/{split}.tsv``.
- MIRACL, ``miracl-v1.0-ko``: ``topics/topics.miracl-v1.0-ko-dev.tsv``,
  ``qrels/qrels.miracl-v1.0-ko-dev.tsv``, and beside these folders the corpus, ``docs-0.jsonl.gz``
  and so on, which is published apart.
- MLDR, ``mldr-v1.0-en``: ``corpus.jsonl.gz``, ``test.jsonl.gz`` (the queries), and
  ``qrels/qrels.mldr-v1.0-en-test.tsv``, in this folder or beside it.

The texts may be compressed (``.gz``) or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """The files of a retrieval set: those of the corpus, the queries, and the judgements."""

    corpus: list[Path]
    queries: Path
    qrels: Path


def find_files(folder: Path, split: str | None) -> Files:
    """Find the files of one split.

    Args:
        folder: see the module.
        split: such as "test"; ``None``: the only one that has judgements, or "test" if there are
            several.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are no judgements for the split.
    """
    topics = sorted((folder / "topics").glob("*.tsv"))
    if topics:
        qrels = _find_qrels([folder / "qrels"], split)
        name = qrels.name.replace("qrels.", "topics.", 1)
        if not (folder / "topics" / name).is_file():
            raise FileNotFoundError(f"{folder / 'topics'}: no {name} in this folder")
        return Files(corpus_files(folder), folder / "topics" / name, qrels)
    corpus = _find(folder, "corpus.jsonl")
    if _present(folder, "queries.jsonl"):
        qrels = _find_qrels([folder / "qrels"], split)
        return Files([corpus], _find(folder, "queries.jsonl"), qrels)
    qrels = _find_qrels([folder / "qrels", folder.parent / "qrels"], split, folder.name)
    found = _split_of(qrels)
    if not _present(folder, f"{found}.jsonl"):
        raise FileNotFoundError(f"{folder}: no queries.jsonl or {found}.jsonl (.gz) in this folder")
    return Files([corpus], _find(folder, f"{found}.jsonl"), qrels)


def corpus_files(path: Path) -> list[Path]:
    """Return the files of a corpus: one file, or the ``docs-*.jsonl`` (``.gz``) of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_dir():
        return [path]
    found = sorted({*path.glob("docs-*.jsonl"), *path.glob("docs-*.jsonl.gz")})
    return found or [_find(path, "corpus.jsonl", "docs-0.jsonl")]


def _present(folder: Path, name: str) -> bool:
    return any((folder / found).exists() for found in (name, f"{name}.gz"))


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.exists():
                return path
    listed = " or ".join(f"{name} or {name}.gz" for name in names)
    raise FileNotFoundError(f"{folder}: no {listed} in this folder")


def _find_qrels(folders: list[Path], split: str | None, of: str | None = None) -> Path:
    """Find the judgements of a split, in a folder of one set or of several.

    Args:
        folders: the first that has judgements counts.
        of: the name of the set; of the files that name a set, those of others do not count.
    """
    present: dict[str, Path] = {}
    for folder in folders:
        paths = sorted(folder.glob("*.tsv"))
        if of is not None:
            published = [path for path in paths if path.name.startswith("qrels.")]
            others = [path for path in published if not path.name.startswith(f"qrels.{of}-")]
            paths = [path for path in paths if path not in others]
        present = {_split_of(path): path for path in paths}
        if present:
            break
    if not present:
        raise FileNotFoundError(f"{folders[0]}: no .tsv file in this folder")
    if split is None:
        split = next(iter(present)) if len(present) == 1 else "test"
    if split not in present:
        raise ValueError(f"split={split!r}: {folders[0]} has judgements for {sorted(present)}")
    return present[split]


def _split_of(path: Path) -> str:
    """The split in the name of judgements: ``test.tsv``, ``qrels.miracl-v1.0-ko-test-a.tsv``."""
    if not path.name.startswith("qrels."):
        return path.stem
    language = path.stem.split("-")  # qrels.miracl, v1.0, ko, test, a
    return "-".join(language[3:]) or path.stem
