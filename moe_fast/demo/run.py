"""The demo from top to bottom."""

from __future__ import annotations

import logging
import warnings
from itertools import islice
from pathlib import Path

import transformers
from datasets.utils.logging import disable_progress_bar

from moe_fast.data import Retrieval
from moe_fast.demo.comparison import ENFORCED, ROUTED, Settings, System, compare_variants, ndcg
from moe_fast.demo.docstrings import DOMAINS, read_pairs, split_pairs
from moe_fast.files import atomic_folder


def run_demo(
    folder: Path, output: Path, *, train_pairs: int, held_out_pairs: int, seed: int, device: str
) -> None:
    """Read the docstrings, train and measure, search, save the better mixture; print as it goes.

    Args:
        folder: of the pretrained model.
        output: for ``demo.md``, ``demo.json``, the pictures and the folder ``model``.
        train_pairs, held_out_pairs: over all domains.
        seed: of everything.
        device: where models run.
    """
    quieten_libraries()
    print("== Texts: docstrings of the installed packages", flush=True)
    pairs = {domain: read_pairs(domain) for domain in DOMAINS}
    print("  ".join(f"{domain}: {len(found):,}" for domain, found in pairs.items()))
    print("query: a docstring's first sentence; document: the rest; the object's name is hidden")
    train, test = split_pairs(pairs, train_pairs, held_out_pairs, seed)
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


def show_searches(system: System, test: Retrieval) -> None:
    """The first held-out query of three domains, not hand-picked, with its best three hits."""
    assert test.domains is not None
    for domain in DOMAINS[::2]:
        query = next(key for key in test.queries if test.domains[key] == domain)
        print(f"\n  [{domain}] {test.queries[query]}")
        for rank, (document, score) in enumerate(islice(system.run[query].items(), 3), start=1):
            mark = "   <- the right one" if document in test.qrels[query] else ""
            print(f"    {rank}. {score:.2f}  {document}{mark}")
            print(f"             {test.corpus[document][:90]}")


def quieten_libraries() -> None:
    """Leave the screen to the demo: progress bars stay, notices about lengths and loading go."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("moe_fast").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*reach the limit", category=UserWarning)
    disable_progress_bar()
