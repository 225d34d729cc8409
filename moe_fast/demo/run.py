"""Runs the whole demo: reads texts, trains, measures, searches and saves."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import transformers
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tqdm import tqdm

from moe_fast.data import Retrieval
from moe_fast.demo.comparison import ENFORCED, ROUTED, Settings, System, compare_variants, ndcg
from moe_fast.demo.docstrings import DOMAINS, DocstringPair, extract_pairs, split_pairs
from moe_fast.files import atomic_folder


def run_demo(
    folder: Path, output: Path, *, train_pairs: int, held_out_pairs: int, seed: int, device: str
) -> None:
    """Read the docstrings, train and measure, search, save the better mixture; print as it goes.

    Args:
        folder: the folder of the pretrained model.
        output: the folder for ``demo.md``, ``demo.json``, the pictures and the folder ``model``.
        train_pairs, held_out_pairs: the numbers of pairs over all domains.
        seed: of all random numbers.
        device: the device that models run on.
    """
    quieten_libraries()
    print("== Texts: docstrings of the installed packages", flush=True)
    pairs = extract_pairs(progress=lambda sources: tqdm(sources, desc="packages"))
    print("  ".join(f"{d}: {n:,}" for d, n in Counter(pair.domain for pair in pairs).items()))
    print("query: a docstring's first sentence; document: the rest; the object's name is hidden")
    train_split, held_out = split_pairs(
        pairs, train_pairs=train_pairs, held_out_pairs=held_out_pairs, seed=seed
    )
    train, test = training_data(train_split), retrieval_of(held_out)
    settings = Settings(train_pairs=len(train), seed=seed, device=device)
    print(f"\n== Three variants, {len(train):,} pairs each, once; at most 20 minutes on two cores")
    systems, mixture = compare_variants(train, test, folder, output, "demo", settings)
    best = max((ENFORCED, ROUTED), key=lambda name: ndcg(systems[name]))
    print(f"== Three searches among {len(test.corpus):,} held-out documents with '{best}'")
    show_searches(systems[best], test)
    with atomic_folder(output / "model", replaces=("*",)) as partial:
        mixture.save_pretrained(str(partial))
    hint = f', domain="{DOMAINS[0]}"' if best == ENFORCED else ""
    print(f"\n== Done; in {output}: demo.md, demo.json, two pictures, and '{best}'. To use it:")
    print(f'  moe_fast.MoESentenceTransformer("{output / "model"}").encode(')
    print(f'      ["Sort an array."]{hint})')


def training_data(pairs: Sequence[DocstringPair]) -> Dataset:
    """Make a dataset with the columns that the comparison needs: query, document, domain."""
    return Dataset.from_dict(
        {name: [getattr(p, name) for p in pairs] for name in ("query", "document", "domain")}
    )


def retrieval_of(pairs: Sequence[DocstringPair]) -> Retrieval:
    """Make a retrieval set in which each query has one relevant document, that of its pair."""
    domains = {pair.name: pair.domain for pair in pairs}
    return Retrieval(
        corpus={pair.name: pair.document for pair in pairs},
        queries={f"? {pair.name}": pair.query for pair in pairs},
        qrels={f"? {pair.name}": {pair.name: 1} for pair in pairs},
        domains={f"? {name}": domain for name, domain in domains.items()},
        corpus_domains=domains,
    )


def show_searches(system: System, test: Retrieval) -> None:
    """Print the first held-out query of three domains, with the best three hits of each."""
    assert test.domains is not None
    for domain in DOMAINS[::2]:
        query = next(key for key in test.queries if test.domains[key] == domain)
        print(f"\n  [{domain}] {test.queries[query]}")
        for rank, (document, score) in enumerate(islice(system.run[query].items(), 3), start=1):
            mark = "   <- the right one" if document in test.qrels[query] else ""
            print(f"    {rank}. {score:.2f}  {document}{mark}")
            print(f"             {test.corpus[document][:90]}")


def quieten_libraries() -> None:
    """Turn off the libraries' notices about lengths and loading; progress bars stay."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("moe_fast").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*reach the limit", category=UserWarning)
    disable_progress_bar()
