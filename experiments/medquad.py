"""MedQuAD: what a fine-tuned mixture gains over the pretrained model, TF-IDF and a dense fine-tune.

    python -m experiments.medquad pairs_medquad_question_answer.jsonl.gz

Questions and answers from nine NIH sites (the domains), split by the disease they are about: 4,000
pairs to train on; 1,000 other questions, searched among 4,000 other answers. Three fine-tunes with
one budget: dense, experts by domain, and a learned router with its balancing losses. Writes
``medquad.json``, ``medquad.md`` and two pictures.
"""

from __future__ import annotations

import argparse
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
from transformers import set_seed

import moe_fast
from moe_fast.data import Retrieval, read_pairs, split_by
from moe_fast.demo.pretrained import MODEL_NAME, pretrained_folder
from moe_fast.evaluation import (
    Bootstrap,
    EncodeOptions,
    TfidfEncoder,
    compare,
    evaluate_run,
    expert_usage,
    retrieve,
)
from moe_fast.evaluation.plots import plot_expert_usage, plot_losses
from moe_fast.evaluation.trec import Run
from moe_fast.files import atomic_write
from moe_fast.losses import InfoNCELoss, RouterLoss
from moe_fast.training import DomainBatchSampler, MoESentenceTransformerTrainer

TFIDF, PRETRAINED, DENSE = "TF-IDF", "pretrained", "dense"
ENFORCED, ROUTED = "MoE, enforced", "MoE, routed"
PLACES = ("all answers", "own domain")


@dataclass(frozen=True)
class Settings:
    """Every number that somebody chose; rate, batch and temperature are the demo's.

    Attributes:
        train_pairs, questions, answers: how many.
        tokens: of a question and of an answer; longer ones are cut.
        load_balance, mutual_information: coefficients of the learned router's losses.
        router_learning_rate: of the learned router; the encoder's hardly moves it.
        usage_answers: answers per domain that the picture of the experts is drawn from.
        seed: of the split, the routers, the dropout, the order of batches and the bootstrap.
    """

    train_pairs: int = 4000
    questions: int = 1000
    answers: int = 4000
    tokens: int = 128
    batch_size: int = 32
    learning_rate: float = 1e-4
    warmup: float = 0.1
    temperature: float = 0.05
    load_balance: float = 0.05
    mutual_information: float = 1.0
    router_learning_rate: float = 1e-3
    usage_answers: int = 20
    seed: int = 0


def main() -> None:
    """Run the experiment from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="the pairs: a, b, domain, focus")
    parser.add_argument("--model", type=Path, help=f"a SentenceTransformer (default: {MODEL_NAME})")
    parser.add_argument("--output", type=Path, default=Path("experiments/results"))
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    data, model, output = (arguments.pop(name) for name in ("data", "model", "output"))
    run(data, model or pretrained_folder(), output, Settings(**arguments))


def run(data: Path, model: Path, output: Path, settings: Settings) -> dict[str, Any]:
    """Everything; returns what ``medquad.json`` holds."""
    start = time.perf_counter()
    train, test = load(data, settings)
    domains = sorted(set(train["domain"]) | set(test.corpus_domains.values()))
    systems: dict[str, dict[str, Any]] = {
        TFIDF: measure(TFIDF, TfidfEncoder(test.corpus.values()), test, settings),
        PRETRAINED: measure(PRETRAINED, build(DENSE, model, domains, settings), test, settings),
    }
    losses, usages = {}, {}
    for name in (DENSE, ENFORCED, ROUTED):
        print(f"\n== {name}", flush=True)
        encoder = build(name, model, domains, settings)
        history, seconds = fine_tune(name, encoder, train, settings)
        losses[name] = [(e["step"] * settings.batch_size, e["loss"]) for e in history]
        systems[name] = measure(name, encoder, test, settings) | {"training seconds": seconds}
        if name != DENSE:
            usages[name] = usage(encoder, test, domains, settings)
    results = {
        "what": (__doc__ or "").split("\n")[0],
        "settings": asdict(settings),
        "data": describe(train, test),
        "machine": machine(),
        "differences": differences(systems),
        "systems": {
            name: row | {place: row[place].to_dict() for place in PLACES}
            for name, row in systems.items()
        },
        "minutes": (time.perf_counter() - start) / 60,
    }
    write(output, results)
    plot_losses(losses, output / "medquad_losses.png", window=10)
    plot_expert_usage(usages, domains, output / "medquad_expert_usage.png", columns=3)
    print("\n" + markdown(results))
    return results


# --- data ----------------------------------------------------------------------------------------


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
    corpus: dict[str, str] = {}  # answer -> id
    for answer in pairs["b"]:
        if len(corpus) < settings.answers:
            corpus.setdefault(answer, f"a{len(corpus)}")
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


def own_domain(run: Run, test: Retrieval) -> Run:
    """Each query's hits of its own domain alone, as if nothing else had been searched."""
    assert test.domains is not None and test.corpus_domains is not None
    return {
        query: {
            document: score
            for document, score in hits.items()
            if test.corpus_domains[document] == test.domains[query]
        }
        for query, hits in run.items()
    }


# --- models --------------------------------------------------------------------------------------


def build(name: str, model: Path, domains: Sequence[str], settings: Settings) -> Any:
    """A fresh copy of the pretrained model, dense or upcycled to one expert per domain."""
    dense = SentenceTransformer(str(model), device="cpu")
    dense.max_seq_length = settings.tokens
    upcycle = partial(moe_fast.upcycle, dense, num_experts=len(domains), seed=settings.seed)
    if name == ENFORCED:
        return upcycle(routing="enforced", domains=domains)
    return upcycle(routing="token_topk") if name == ROUTED else dense


def loss_of(name: str, model: Any, settings: Settings) -> nn.Module:
    """Symmetric InfoNCE; with a learned router, its losses too."""
    loss = InfoNCELoss(model, temperature=settings.temperature, symmetric=True)
    if name != ROUTED:
        return loss
    return RouterLoss(
        loss,
        load_balance=settings.load_balance,
        mutual_information=settings.mutual_information,
        num_domains=model.transformers_model.config.num_experts,  # one expert per domain
    )


def fine_tune(
    name: str, model: Any, train: Dataset, settings: Settings
) -> tuple[list[dict[str, float]], float]:
    """One pass over the pairs, in place: (what was logged at each step, seconds)."""
    set_seed(settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=settings.batch_size,
            batch_sampler=DomainBatchSampler,
            learning_rate=settings.learning_rate,
            learning_rate_mapping=(
                {r"mlp\.router\.": settings.router_learning_rate} if name == ROUTED else None
            ),
            warmup_steps=settings.warmup,  # below 1: a share of all steps
            seed=settings.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = MoESentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=train, loss=loss_of(name, model, settings)
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry], seconds


# --- measurement ---------------------------------------------------------------------------------


def measure(name: str, model: Any, test: Retrieval, settings: Settings) -> dict[str, Any]:
    """Scores over everything and within the query's own domain; parameters."""
    options = EncodeOptions(batch_size=64, truncate=True if name != TFIDF else None)
    run = retrieve(model, test, depth=len(test.corpus), encode=options)
    bootstrap = Bootstrap(seed=settings.seed)
    whole = evaluate_run(run, test, name=name, bootstrap=bootstrap)
    own = evaluate_run(
        own_domain(run, test), test, measures=("nDCG@10",), name=name, bootstrap=bootstrap
    )
    print(f"{name}: nDCG@10 {whole.scores['all']['nDCG@10'].value:.3f}", flush=True)
    row: dict[str, Any] = dict(zip(PLACES, (whole, own), strict=True))
    if name != TFIDF:
        encoder = model.transformers_model
        is_mixture = name in (ENFORCED, ROUTED)
        row["parameters"] = encoder.num_parameters()
        row["active parameters"] = (
            encoder.num_parameters(only_active=True) if is_mixture else row["parameters"]
        )
    return row


def usage(model: Any, test: Retrieval, domains: Sequence[str], settings: Settings) -> Any:
    """Where the tokens of each domain's first answers go: [domain, layer, expert]."""
    assert test.corpus_domains is not None
    texts: list[tuple[str, str]] = []
    for domain in domains:
        ids = [key for key in test.corpus if test.corpus_domains[key] == domain]
        texts += [(test.corpus[key], domain) for key in ids[: settings.usage_answers]]
    return expert_usage(
        model,
        [text for text, _ in texts],
        [domain for _, domain in texts],
        order=domains,
        pass_domain=bool(model.transformers_model.config.domains),
        truncate=True,
        show_progress_bar=False,
    )


def differences(systems: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each mixture minus each other system, paired by question."""
    return [
        {"searched": place} | compare(systems[mixture][place], systems[other][place]).to_dict()
        for mixture in (ENFORCED, ROUTED)
        for other in systems
        if other != mixture
        for place in PLACES
    ]


# --- report --------------------------------------------------------------------------------------


def describe(train: Dataset, test: Retrieval) -> dict[str, Any]:
    """How many of what, by domain."""
    assert test.domains is not None and test.corpus_domains is not None
    counted = {
        "training pairs": train["domain"],
        "questions": test.domains.values(),
        "answers": test.corpus_domains.values(),
    }
    return {name: dict(sorted(Counter(values).items())) for name, values in counted.items()}


def machine() -> dict[str, Any]:
    """What the seconds depend on, and the versions."""
    packages = ("torch", "transformers", "sentence-transformers", "ir-measures", "scikit-learn")
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "moe-fast": moe_fast.__version__,
    } | {package: version(package) for package in packages}


def write(output: Path, results: Mapping[str, Any]) -> None:
    """``medquad.json`` and ``medquad.md``."""
    contents = {
        "medquad.json": json.dumps(results, indent=1) + "\n",
        "medquad.md": markdown(results),
    }
    for name, text in contents.items():
        with atomic_write(output / name) as partial_file:
            partial_file.write_text(text, encoding="utf-8")


def markdown(results: Mapping[str, Any]) -> str:
    """Two tables: what each system scores, and what the mixtures gain."""
    rows = [
        "| system | nDCG@10 | MRR@10 | Recall@10 | nDCG@10 in own domain "
        "| active / all parameters | training |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results["systems"].items():
        scores = [row[PLACES[0]]["scores"]["all"][m] for m in ("nDCG@10", "MRR@10", "Recall@10")]
        scores.append(row[PLACES[1]]["scores"]["all"]["nDCG@10"])
        counts = [row.get("active parameters"), row.get("parameters")]
        sizes = " / ".join(f"{n / 1e6:.1f} M" for n in counts if n) or "-"
        seconds = f"{row['training seconds']:.0f} s" if "training seconds" in row else "-"
        rows.append(f"| {' | '.join([name, *map(interval, scores), sizes, seconds])} |")
    rows += ["", "| difference, paired | nDCG@10 | nDCG@10 in own domain |", "| --- | --- | --- |"]
    found = results["differences"]
    for whole, own in zip(found[::2], found[1::2], strict=True):
        cells = [interval(d["differences"]["all"]["nDCG@10"], "+") for d in (whole, own)]
        rows.append(f"| {whole['first']} - {whole['second']} | {' | '.join(cells)} |")
    data = {name: sum(counts.values()) for name, counts in results["data"].items()}
    counts = ", ".join(f"{number:,} {name}" for name, number in data.items())
    note = f"{counts}; 95 % bootstrap intervals over questions; {results['minutes']:.0f} minutes."
    return "\n".join([*rows, "", note, ""])


def interval(score: Mapping[str, float], sign: str = "") -> str:
    """``.775 [.754, .795]``."""
    value, low, high = (
        f"{score[k]:{sign}.3f}".replace("0.", ".") for k in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


if __name__ == "__main__":
    main()
