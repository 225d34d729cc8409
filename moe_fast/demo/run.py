"""The demo from top to bottom."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets.utils.logging import disable_progress_bar
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from moe_fast.demo import report
from moe_fast.demo.docstrings import (
    DOMAINS,
    SOURCES,
    DocstringPair,
    DocstringSplits,
    extract_pairs,
    split_pairs,
)
from moe_fast.demo.pretrained import MODEL_NAME, pretrained_folder
from moe_fast.demo.settings import DemoSettings
from moe_fast.demo.systems import System, embed_pairs, measure_usage, score, tfidf_baseline
from moe_fast.demo.variants import (
    DENSE,
    ENFORCED,
    VARIANTS,
    build_variant,
    count_parameters,
    is_enforced,
    is_mixture,
    save_model,
    train_variant,
)
from moe_fast.evaluation import search

Vectors = NDArray[np.float32]
DOMAIN_HINT = f', domain="{DOMAINS[0]}"'


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """Run everything; print as it goes.

    Returns:
        What ``results.json`` holds.
    """
    start = time.perf_counter()
    folder = pretrained_folder()
    settings.output.mkdir(parents=True, exist_ok=True)
    quieten_libraries()
    splits = collect_pairs(settings)

    print_step(f"Baselines: TF-IDF and {MODEL_NAME} as it comes")
    systems = [tfidf_baseline(splits.held_out)]
    pretrained = build_variant(DENSE, folder, settings)
    systems.append(measure_model("pretrained", pretrained, splits.held_out, settings)[0])

    best: tuple[System, SentenceTransformer, tuple[Vectors, Vectors]] | None = None
    for name in VARIANTS:
        system, model, vectors = train_and_measure(name, folder, splits, settings)
        systems.append(system)
        if is_mixture(model) and (best is None or overall(system) > overall(best[0])):
            best = system, model, vectors
    assert best is not None

    results = report_results(systems, splits, settings)
    show_searches(best[0], best[2], splits.held_out)
    save_model(best[1], settings.output / "model")
    results["seconds"] = time.perf_counter() - start
    report.write_results(settings.output, results)
    print_step(f"Done in {results['seconds'] / 60:.1f} minutes; written to {settings.output}")
    print("table.md  results.json  expert_usage.png  losses.png")
    print(f"model: '{best[0].name}', the mixture with the higher held-out nDCG@10. To use it:")
    print(f'  moe_fast.MoESentenceTransformer("{settings.output / "model"}").encode(')
    print(f'      ["Sort an array."]{DOMAIN_HINT if is_enforced(best[1]) else ""})')
    return results


def collect_pairs(settings: DemoSettings) -> DocstringSplits:
    """Read the docstrings and split them; print how many there are."""
    print_step("Texts: docstrings of the installed packages")
    pairs = extract_pairs(progress=lambda sources: tqdm(sources, desc="packages"))
    splits = split_pairs(
        pairs,
        train_pairs=settings.train_pairs,
        held_out_pairs=settings.held_out_pairs,
        seed=settings.seed,
    )
    for source in SOURCES:
        found, train, held_out = (
            sum(pair.domain == source.domain for pair in part)
            for part in (pairs, splits.train, splits.held_out)
        )
        print(
            f"  {source.domain:13s} {source.version:12s} {found:5d} pairs found, "
            f"{train:4d} for training, {held_out:4d} held out"
        )
    print(
        f"  query: a docstring's first sentence (up to {settings.query_tokens} tokens); document: "
        f"the rest (up to {settings.document_tokens});\n  the object's name is hidden in both\n"
        f"  budget: {len(VARIANTS)} variants x {len(splits.train):,} pairs x 1 pass, "
        f"{torch.get_num_threads()} threads; planned for at most 20 minutes on two cores"
    )
    return splits


def train_and_measure(
    name: str, folder: Path, splits: DocstringSplits, settings: DemoSettings
) -> tuple[System, SentenceTransformer, tuple[Vectors, Vectors]]:
    """Train one variant and score it on the held-out pairs."""
    print_step(f"{name}: {VARIANTS[name]}")
    trained = train_variant(build_variant(name, folder, settings), splits.train, settings)
    system, vectors = measure_model(name, trained.model, splits.held_out, settings)
    system.train_pairs = len(splits.train)
    system.train_seconds = trained.seconds
    system.losses = trained.losses
    if is_mixture(trained.model):
        system.usage = measure_usage(trained.model, splits.held_out, settings)
    return system, trained.model, vectors


def measure_model(
    name: str, model: SentenceTransformer, pairs: Sequence[DocstringPair], settings: DemoSettings
) -> tuple[System, tuple[Vectors, Vectors]]:
    """Embed and score the held-out pairs: (table row, (query vectors, document vectors))."""
    vectors = embed_pairs(model, pairs, settings)
    active, total = count_parameters(model)
    scores = score(*vectors, [pair.domain for pair in pairs])
    system = System(name, scores, active_parameters=active, total_parameters=total)
    print(f"  held-out nDCG@10 {overall(system):.3f}")
    return system, vectors


def overall(system: System) -> float:
    """Mean nDCG@10 over all held-out queries."""
    return float(system.scores["nDCG@10"].mean())


def report_results(
    systems: Sequence[System], splits: DocstringSplits, settings: DemoSettings
) -> dict[str, Any]:
    """Print and write the table and the differences; draw the pictures."""
    domains = [pair.domain for pair in splits.held_out]
    summaries = [report.summarise(system, domains, settings) for system in systems]
    dense = next(system for system in systems if system.name == DENSE)
    mixtures = [system for system in systems if system.usage is not None]
    found = report.differences(mixtures, dense, settings)
    notes = (
        f"{len(domains):,} held-out queries, each against all {len(domains):,} held-out documents; "
        "a domain's column: nDCG@10 / MRR@10; intervals: bootstrap over queries. "
        f"'{ENFORCED}' is told the domain of every query and document, the others are not: "
        "the column for the own domain searches that domain's documents alone, where telling "
        "domains apart is worth nothing. "
        "TF-IDF reads documents uncut, up to 160 words."
    )
    text = f"{report.markdown_table(summaries)}\n\n{notes}\n\n{report.markdown_differences(found)}"
    print_step("Results")
    print(text)
    report.write_table(settings.output, text)
    report.draw(settings.output, systems)
    return {
        "versions": report.versions(),
        "settings": asdict(settings) | {"output": str(settings.output)},
        "threads": torch.get_num_threads(),
        "train_pairs": len(splits.train),
        "held_out_pairs": len(splits.held_out),
        "systems": summaries,
        "differences": found,
    }


def show_searches(
    system: System, vectors: tuple[Vectors, Vectors], pairs: Sequence[DocstringPair]
) -> None:
    """Three example searches: the first held-out query of three domains, not hand-picked."""
    print_step(f"Three searches among {len(pairs):,} held-out documents with '{system.name}'")
    queries, documents = vectors
    rows = [next(i for i, p in enumerate(pairs) if p.domain == d) for d in DOMAINS[::2]]
    scores, hits = search(queries[rows], documents, k=3)
    for row, row_scores, row_hits in zip(rows, scores, hits, strict=True):
        print(f"\n  [{pairs[row].domain}] {pairs[row].query}")
        for rank, (value, hit) in enumerate(zip(row_scores, row_hits, strict=True), start=1):
            mark = "   <- the right one" if hit == row else ""
            print(f"    {rank}. {value:.2f}  {pairs[hit].name}{mark}")
            print(f"             {pairs[hit].document[:90]}")


def quieten_libraries() -> None:
    """Leave the screen to the demo: progress bars stay, notices about lengths and loading go."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("moe_fast").setLevel(logging.ERROR)
    # settings.py says that texts are cut, and how many
    warnings.filterwarnings("ignore", message=".*reach the limit", category=UserWarning)
    disable_progress_bar()


def print_step(title: str) -> None:
    """A heading."""
    print(f"\n== {title}", flush=True)
