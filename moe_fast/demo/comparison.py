"""Fine-tunes a dense model and two mixtures of it alike, and measures them on held-out texts."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import nn
from transformers import ProgressCallback, TrainerCallback, set_seed

import moe_fast
from moe_fast.data import Retrieval
from moe_fast.evaluation import (
    Bootstrap,
    Comparison,
    EncodeOptions,
    Evaluation,
    TfidfEncoder,
    compare,
    evaluate_run,
    expert_usage,
    format_table,
    retrieve,
)
from moe_fast.evaluation.plots import plot_expert_usage, plot_losses
from moe_fast.evaluation.trec import Run
from moe_fast.files import write_text
from moe_fast.losses import InfoNCELoss, RouterLoss
from moe_fast.training import DomainBatchSampler, MoESentenceTransformerTrainer

TFIDF, PRETRAINED, DENSE = "TF-IDF", "pretrained", "dense"
ENFORCED, ROUTED = "MoE, enforced", "MoE, routed"
PLACES = ("everything", "own domain")
"""The sets of documents that are searched: all, or those of the query's domain. In the second, a
system that knows the domains has no advantage from distinguishing domains."""


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison.

    The learning rate was chosen with other pairs of the demo, 960 for training and 500 for scoring.
    The nDCG@10 of the dense model was .748 before training, .778 with a learning rate of 2e-5, .790
    with 5e-5, .798 with 1e-4 and .783 with 2e-4, from one run each: differences of .01 are noise.
    The mixtures use the learning rate that was best for the dense model.

    Attributes:
        train_pairs: the number of training pairs; each variant sees each pair once.
        tokens: the largest number of tokens per text; longer texts are cut.
        batch_size: pairs per step; each query's negatives are the batch's other documents.
        learning_rate: the largest learning rate, reached after the share ``warmup`` of the steps;
            it then falls to 0.
        temperature: the temperature of the loss.
        load_balance, mutual_information: coefficients of the learned router's losses.
        router_learning_rate: the learning rate of a router that has such losses, because the
            encoder's hardly changes it.
        usage_texts: texts per domain, for the picture of the experts.
        seed: of the data, the routers, the dropout, the order of batches and the bootstrap.
        device: the device that models run on.
    """

    train_pairs: int = 2950
    tokens: int = 128
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup: float = 0.1
    temperature: float = 0.05
    load_balance: float = 0.0
    mutual_information: float = 0.0
    router_learning_rate: float = 1e-3
    usage_texts: int = 20
    seed: int = 0
    device: str = "cpu"


@dataclass
class System:
    """A model or baseline with its scores and costs, one row of the table.

    Attributes:
        scores: {set of documents searched: `Evaluation`}.
        run: the hits among all documents.
        costs: the parameters that a token uses, all parameters and, if it was trained, the
            seconds; empty for TF-IDF.
        history: what the trainer logged at each step.
    """

    scores: dict[str, Evaluation]
    run: Run
    costs: dict[str, float]
    history: list[dict[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores, costs and history as JSON can hold them."""
        scores = {place: scores.to_dict() for place, scores in self.scores.items()}
        return {**scores, "costs": self.costs, "history": self.history}


def compare_variants(
    train: Dataset, test: Retrieval, model: Path, output: Path, name: str, settings: Settings
) -> tuple[dict[str, System], Any]:
    """Measure the baselines, fine-tune and measure the three variants, and write the results.

    The results are the files ``name.md`` and ``name.json``, and pictures.

    Returns:
        The systems by name, and the mixture with the higher nDCG@10.
    """
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    domains = domains_of(train, test)
    systems = {TFIDF: measure(TFIDF, TfidfEncoder(test.corpus.values()), test, settings)}
    systems[PRETRAINED] = measure(
        PRETRAINED, build(DENSE, model, domains, settings), test, settings
    )
    usages, best, mixture = {}, -1.0, None
    for variant in (DENSE, ENFORCED, ROUTED):
        encoder = build(variant, model, domains, settings)
        history, seconds = fine_tune(encoder, train, loss_of(variant, encoder, settings), settings)
        systems[variant] = measure(variant, encoder, test, settings, history, seconds)
        if variant != DENSE:
            usages[variant] = usage(encoder, test, domains, settings)
            if (found := ndcg(systems[variant])) > best:
                best, mixture = found, encoder
    others = {v: [n for n in systems if n != v] for v in (ENFORCED, ROUTED)}
    minutes = (time.perf_counter() - start) / 60
    write(output, name, systems, others, describe(train, test), asdict(settings), minutes)
    losses = {
        variant: [(e["step"] * settings.batch_size, e["loss"]) for e in system.history]
        for variant, system in systems.items()
        if system.history
    }
    plot_losses(losses, output / f"{name}_losses.png")
    plot_expert_usage(usages, domains, output / f"{name}_expert_usage.png")
    return systems, mixture


def domains_of(train: Dataset, test: Retrieval) -> list[str]:
    """Return the domains of the training pairs and of the documents, sorted."""
    return sorted(set(train["domain"]) | set((test.corpus_domains or {}).values()))


# --- models --------------------------------------------------------------------------------------


def build(variant: str, model: Path, domains: Sequence[str], settings: Settings) -> Any:
    """Load the pretrained model, and upcycle it to one expert per domain unless it stays dense."""
    dense = SentenceTransformer(str(model), device=settings.device)
    dense.max_seq_length = settings.tokens
    upcycle = partial(moe_fast.upcycle, dense, num_experts=len(domains), seed=settings.seed)
    if variant == ENFORCED:
        return upcycle(routing="enforced", domains=domains)
    return upcycle(routing="token_topk") if variant == ROUTED else dense


def loss_of(variant: str, model: Any, settings: Settings) -> nn.Module:
    """Make symmetric InfoNCE; for a learned router, add router losses with nonzero coefficients."""
    loss = InfoNCELoss(model, temperature=settings.temperature, symmetric=True)
    if variant != ROUTED or not (settings.load_balance or settings.mutual_information):
        return loss
    return RouterLoss(
        loss,
        load_balance=settings.load_balance,
        mutual_information=settings.mutual_information,
        num_domains=model.transformers_model.config.num_experts,  # one expert per domain
    )


def fine_tune(
    model: Any,
    train: Dataset,
    loss: nn.Module,
    settings: Settings,
    callbacks: Sequence[TrainerCallback] = (),
    **arguments: Any,
) -> tuple[list[dict[str, float]], float]:
    """Train a model in place for one pass over the pairs.

    Args:
        arguments: arguments of the trainer, which override those from the settings.

    Returns:
        (what was logged at each step, seconds).
    """
    set_seed(settings.seed)
    router = {r"mlp\.router\.": settings.router_learning_rate}
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = dict(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            batch_sampler=DomainBatchSampler,
            learning_rate=settings.learning_rate,
            learning_rate_mapping=router if isinstance(loss, RouterLoss) else None,
            warmup_steps=settings.warmup,  # below 1: a share of all steps
            seed=settings.seed,
            disable_tqdm=False,
            use_cpu=settings.device == "cpu",
            dataloader_pin_memory=settings.device != "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = MoESentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(**(given | arguments)),
            train_dataset=train,
            loss=loss,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(OneLineProgress())
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry], seconds


class OneLineProgress(ProgressCallback):
    """A progress bar with the loss behind it, instead of transformers' line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss behind the progress bar; the trainer calls this."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


# --- measurement ---------------------------------------------------------------------------------


def measure(
    name: str,
    model: Any,
    test: Retrieval,
    settings: Settings,
    history: Sequence[dict[str, float]] = (),
    seconds: float | None = None,
) -> System:
    """Measure a system over all documents and within the query's domain, and its costs."""
    options = EncodeOptions(batch_size=64, truncate=True if name != TFIDF else None)
    run = retrieve(model, test, depth=len(test.corpus), encode=options)
    evaluate = partial(
        evaluate_run, retrieval=test, name=name, bootstrap=Bootstrap(seed=settings.seed)
    )
    found = evaluate(run), evaluate(own_domain(run, test), measures=("nDCG@10",))
    costs: dict[str, float] = {}
    if name != TFIDF:
        encoder = model.transformers_model
        costs["parameters"] = costs["active parameters"] = encoder.num_parameters()
        if getattr(encoder.config, "num_experts", None):
            costs["active parameters"] = encoder.num_parameters(only_active=True)
    if seconds is not None:
        costs["training seconds"] = seconds
    system = System(dict(zip(PLACES, found, strict=True)), run, costs, list(history))
    print(f"{name}: nDCG@10 {ndcg(system):.3f}", flush=True)
    return system


def ndcg(system: System) -> float:
    """Return nDCG@10 over all queries, searched among all documents."""
    return system.scores[PLACES[0]].scores["all"]["nDCG@10"].value


def own_domain(run: Run, test: Retrieval) -> Run:
    """Keep each query's hits of its own domain, as if only this domain had been searched."""
    assert test.domains is not None and test.corpus_domains is not None
    return {
        query: {
            document: score
            for document, score in hits.items()
            if test.corpus_domains[document] == test.domains[query]
        }
        for query, hits in run.items()
    }


def usage(model: Any, test: Retrieval, domains: Sequence[str], settings: Settings) -> Any:
    """Return the experts' shares of the tokens of each domain's first documents.

    Returns:
        [domain, layer, expert].
    """
    assert test.corpus_domains is not None
    ids: list[str] = []
    for domain in domains:
        own = [key for key in test.corpus if test.corpus_domains[key] == domain]
        ids += own[: settings.usage_texts]
    return expert_usage(
        model,
        [test.corpus[key] for key in ids],
        [test.corpus_domains[key] for key in ids],
        order=domains,
        pass_domain=bool(model.transformers_model.config.domains),
        truncate=True,
        show_progress_bar=False,
    )


# --- report --------------------------------------------------------------------------------------


def write(
    output: Path,
    name: str,
    systems: Mapping[str, System],
    others: Mapping[str, Sequence[str]],
    data: Mapping[str, Any],
    settings: Mapping[str, Any],
    minutes: float,
) -> None:
    """Write ``name.json`` with all numbers, and ``name.md`` with the tables, which are printed.

    Args:
        others: {system: the systems that it is compared with}.
    """
    differences = {
        place: [
            compare(systems[first].scores[place], systems[second].scores[place])
            for first, seconds in others.items()
            for second in seconds
        ]
        for place in PLACES
    }
    record = {
        "settings": settings,
        "data": data,
        "machine": machine(),
        "differences": {
            place: [d.to_dict() for d in found] for place, found in differences.items()
        },
        "systems": {name: system.to_dict() for name, system in systems.items()},
        "minutes": minutes,
    }
    tables = markdown(systems, differences, data, minutes)
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", tables)):
        write_text(output / f"{name}{suffix}", text)
    print("\n" + tables)


def markdown(
    systems: Mapping[str, System],
    differences: Mapping[str, Sequence[Comparison]],
    data: Mapping[str, Any],
    minutes: float,
) -> str:
    """Format a table for each set of documents searched, a table of costs, and the data's sizes."""
    parts = []
    for place in PLACES:
        scores = [system.scores[place] for system in systems.values()]
        table = format_table(scores, differences[place], markdown=True)
        parts.append(f"Searched among {place}:\n\n{table}\n")
    rows = ["| system | active / all parameters | training |", "| --- | --- | --- |"]
    for name, system in systems.items():
        sizes = [system.costs.get(key) for key in ("active parameters", "parameters")]
        millions = " / ".join(f"{size / 1e6:.1f} M" for size in sizes if size) or "-"
        seconds = system.costs.get("training seconds")
        steps = f"{len(system.history):,} steps, {seconds:.0f} s" if seconds is not None else "-"
        rows.append(f"| {name} | {millions} | {steps} |")
    counts = ", ".join(f"{sum(by_domain.values()):,} {key}" for key, by_domain in data.items())
    note = f"{counts}; bootstrap intervals over queries; {minutes:.0f} minutes."
    return "\n".join([*parts, *rows, "", note, ""])


def describe(train: Dataset, test: Retrieval) -> dict[str, dict[str, int]]:
    """Return the numbers of training pairs, queries and documents by domain."""
    assert test.domains is not None and test.corpus_domains is not None
    counted = {
        "training pairs": train["domain"],
        "queries": test.domains.values(),
        "documents": test.corpus_domains.values(),
    }
    return {name: dict(sorted(Counter(values).items())) for name, values in counted.items()}


def machine() -> dict[str, Any]:
    """Return the processor and threads, which the times depend on, and the packages' versions."""
    packages = ("torch", "transformers", "sentence-transformers", "ir-measures", "scikit-learn")
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "moe-fast": moe_fast.__version__,
    } | {package: version(package) for package in packages}
