"""Makes positive and negative pairs of papers from a citation graph.

Two papers that are often cited together are about the same thing (co-citation, Small 1973). The
method follows Hallee et al. (arXiv 2401.15713), who train on pairs of co-cited abstracts. Their
published code only cleans the data: the rest follows the description in the paper, and is our own
choice where the paper says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_fast.data.citation_graph import Ints, cocited, unlinked, without_surveys
from moe_fast.data.file_formats import Row
from moe_fast.data.papers import Papers, read_papers
from moe_fast.data.sources import AnySource
from moe_fast.data.splits import assign_groups, check_fractions
from moe_fast.data.tables import dataset_from_rows
from moe_fast.ops.checks import check_count

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class CocitationReport:
    """Counts of the papers, their links and the pairs made of them.

    Attributes:
        rows: papers in the file.
        papers: papers with different abstracts.
        links: citations between these papers, each counted once.
        links_outside: citations with one end that is not in the file; they are dropped.
        self_citations: citations of a paper by itself; they are dropped.
        passed_over: papers with more than ``max_references`` references, which are not counted as
            citing two papers together.
        cocited: pairs of papers that at least ``min_cocitations`` other papers cite together.
        across_domains: those of these pairs whose papers have different domains; dropped.
        across_splits: those of the remaining pairs whose papers are in different splits; dropped.
        not_drawn: the number of remaining pairs beyond ``max_pairs``; dropped.
        papers_per_split: {split: number of papers}, whether they are in a pair or not.
        positives, negatives: {split: number of pairs} in the result.
        negatives_missing: negatives that could not be made, because a paper had no further paper
            without a link.
    """

    rows: int
    papers: int
    links: int
    links_outside: int
    self_citations: int
    passed_over: int
    cocited: int
    across_domains: int
    across_splits: int
    not_drawn: int
    papers_per_split: dict[str, int]
    positives: dict[str, int]
    negatives: dict[str, int]
    negatives_missing: int

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as a dict that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class CocitationPairs:
    """The pairs of each split, and the counts of how they were made.

    Attributes:
        splits: {"train", "dev" or "test": dataset}, for the splits with a fraction above 0.
        report: the counts.
    """

    splits: dict[str, Dataset]
    report: CocitationReport


def cocitation_pairs(
    papers: AnySource,
    *,
    columns: Mapping[str, str] | None = None,
    delimiter: str | None = None,
    skip_invalid: bool = False,
    min_cocitations: int = 1,
    negatives_per_positive: int = 1,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    max_references: int | None = None,
    max_pairs: int | None = None,
    ids: bool = False,
    seed: int = 0,
) -> CocitationPairs:
    """Make pairs of co-cited papers and pairs without a link, in splits that share no paper.

    - *Positive*: two papers of one domain cited together by at least `min_cocitations` papers of
      the file other than themselves.
    - *Negative*: a paper of a positive pair (either, at random) with a paper of the same split and
      domain, drawn uniformly from those with *no link*: neither cites the other, and no paper of
      the file cites both, not even one that `max_references` leaves out. No pair occurs twice.
    - *Splits*: the papers of each domain are divided at random by `fractions` before any pair is
      made; pairs across splits are dropped. With the default fractions about .64 of the pairs end
      in train and .01 each in dev and test; the others are dropped.

    Time and memory: the co-citation matrix is computed block by block, and only the positives of a
    block are kept. A paper with r references in the file makes r (r - 1) / 2 co-cited pairs: a
    survey with 5,000 makes 12 million. `max_references` leaves such papers out, and `max_pairs`
    bounds the size of the result, which holds the two texts of every pair in memory.

    Args:
        papers: see `read_papers`.
        columns, delimiter, skip_invalid: see `read_papers`.
        min_cocitations: the number of papers that must cite both papers of a positive, at least 1.
        negatives_per_positive: at least 0; with 0 there is no column ``label``.
        fractions: the shares of the papers in train, dev and test, adding up to 1. A split with
            share 0 is not made.
        max_references: ignore the citations of papers with more references in the file than this,
            at least 2; ``None``: no limit.
        max_pairs: draw this many positives at random if there are more; ``None``: no limit.
        ids: add the columns ``a_id`` and ``b_id``. `read_pairs` leaves them out; remove them before
            training, because a trainer takes them for texts.
        seed: of the splits, the draws and the order of the two papers in a pair.

    Returns:
        For each split a dataset with the columns ``a`` and ``b`` (str, abstracts), ``domain`` (str)
        if the file has it, and ``label`` (int64); positives (1) come before negatives (0).

    Raises:
        ValueError: an argument is out of range.
        ValueError: a split with a share above 0 gets no positive pair.
        TypeError: a count is not an int.
        FileNotFoundError, ValueError, ImportError: as `read_papers`.
    """
    check_count("min_cocitations", min_cocitations)
    check_count("negatives_per_positive", negatives_per_positive, at_least=0)
    check_count("max_references", 2 if max_references is None else max_references, at_least=2)
    check_count("max_pairs", 1 if max_pairs is None else max_pairs)
    if len(fractions) != len(SPLITS):
        raise ValueError(f"fractions must be three, of train, dev and test; got {fractions}")
    check_fractions(fractions)
    graph = read_papers(papers, columns=columns, delimiter=delimiter, skip_invalid=skip_invalid)
    for_splits, for_draws = np.random.SeedSequence(seed).spawn(2)
    _, domains = np.unique(graph.domains or [""] * len(graph), return_inverse=True)
    split_of = _split_papers(domains, fractions, for_splits)
    citations, passed_over = without_surveys(graph.citations, max_references or len(graph))
    rng = np.random.default_rng(for_draws)
    found = cocited(citations, min_cocitations)
    positives, counts = _keep(found, domains, split_of, max_pairs, rng)
    _check_splits(split_of[positives[0]], fractions, counts, min_cocitations)
    wanted = np.bincount(positives[0], minlength=len(graph)) * negatives_per_positive
    negatives = unlinked(graph.citations, wanted, domains * len(SPLITS) + split_of, rng)
    report = CocitationReport(
        rows=graph.rows,
        papers=len(graph),
        links=graph.citations.nnz,
        links_outside=graph.links_outside,
        self_citations=graph.self_citations,
        passed_over=passed_over,
        **counts,
        papers_per_split=_per_split(split_of),
        positives=_per_split(split_of[positives[0]]),
        negatives=_per_split(split_of[negatives[0]]),
        negatives_missing=int(wanted.sum()) - negatives.shape[1],
    )
    splits = {}
    for split in np.flatnonzero(fractions):
        labelled = [(1, positives[:, split_of[positives[0]] == split])]
        if negatives_per_positive:
            labelled.append((0, negatives[:, split_of[negatives[0]] == split]))
        splits[SPLITS[split]] = _dataset(graph, labelled, ids)
    return CocitationPairs(splits, report)


def _keep(
    pairs: Ints, domains: Ints, split_of: Ints, max_pairs: int | None, rng: np.random.Generator
) -> tuple[Ints, dict[str, int]]:
    """Drop pairs across domains and splits, and draw `max_pairs` of the rest.

    Returns:
        The positives [2, P], each with its two papers in random order, and the counts of the pairs
        found and dropped, as in `CocitationReport`.
    """
    counts = {"cocited": pairs.shape[1]}
    for reason, group in (("across_domains", domains), ("across_splits", split_of)):
        together = group[pairs[0]] == group[pairs[1]]
        counts[reason] = int((~together).sum())
        pairs = pairs[:, together]
    counts["not_drawn"] = max(0, pairs.shape[1] - max_pairs) if max_pairs is not None else 0
    if counts["not_drawn"]:
        pairs = pairs[:, np.sort(rng.choice(pairs.shape[1], max_pairs, replace=False))]
    return np.where(rng.random(pairs.shape[1]) < 0.5, pairs[::-1], pairs), counts


def _split_papers(domains: Ints, fractions: Sequence[float], seed: np.random.SeedSequence) -> Ints:
    """Assign papers to splits, each domain separately; returns [N], the split of each paper."""
    split_of = np.empty_like(domains)
    for domain, domain_seed in enumerate(seed.spawn(int(domains.max()) + 1)):
        chosen = domains == domain
        split_of[chosen] = assign_groups(np.arange(chosen.sum()), fractions, domain_seed)
    return split_of


def _dataset(graph: Papers, labelled: Sequence[tuple[int, Ints]], ids: bool) -> Dataset:
    """Make a dataset of the pairs of each label, in this order.

    It has a column ``label`` only if there are several labels.
    """

    def row(first: int, second: int, label: int) -> Row:
        values: Row = {"a": graph.abstracts[first], "b": graph.abstracts[second]}
        if graph.domains is not None:
            values["domain"] = graph.domains[first]
        if len(labelled) > 1:
            values["label"] = label
        if ids:
            values.update(a_id=graph.ids[first], b_id=graph.ids[second])
        return values

    rows = (row(a, b, label) for label, pairs in labelled for a, b in pairs.T.tolist())
    return dataset_from_rows(rows)


def _per_split(splits: Ints) -> dict[str, int]:
    return dict(zip(SPLITS, np.bincount(splits, minlength=len(SPLITS)).tolist(), strict=True))


def _check_splits(
    splits: Ints, fractions: Sequence[float], counts: Mapping[str, int], min_cocitations: int
) -> None:
    if not counts["cocited"]:
        raise ValueError(
            f"no two papers are cited together by min_cocitations={min_cocitations} papers of the "
            "file"
        )
    for name, pairs, fraction in zip(SPLITS, _per_split(splits).values(), fractions, strict=True):
        if fraction > 0 and not pairs:
            raise ValueError(
                f"split {name!r} gets no pair: of {counts['cocited']} co-cited pairs "
                f"{counts['across_domains']} are of two domains and {counts['across_splits']} "
                f"across splits; raise its share in fractions={tuple(fractions)} or set it to 0"
            )
