"""``moe-fast evaluate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import BatchSize, Device, ModelArgument, Overwrite, Truncate, split_commas

if TYPE_CHECKING:
    from moe_fast.evaluation import Evaluation

EXAMPLE = "moe-fast evaluate mixture --pairs pairs.jsonl --against other-mixture --json scores.json"
_DATA = "What to measure on"
_MEASURES = ["nDCG@10,MRR@10,Recall@10"]


def run_command(
    model: ModelArgument,
    *,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Pairs, with labels or positives alone.", rich_help_panel=_DATA),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(
            help="Labelled pairs that choose the accuracy's threshold.", rich_help_panel=_DATA
        ),
    ] = None,
    retrieval: Annotated[
        Path | None,
        typer.Option(
            help="BEIR folder, or a .json file of corpus, queries and qrels.", rich_help_panel=_DATA
        ),
    ] = None,
    sts: Annotated[
        Path | None, typer.Option(help="Sentence pairs with scores.", rich_help_panel=_DATA)
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another model: show the paired differences to it.")
    ] = None,
    json_output: Annotated[Path | None, typer.Option("--json", help="File to write.")] = None,
    measures: Annotated[
        list[str], typer.Option(help="Of the retrieval: nDCG@k, MRR@k, Recall@k, MAP@k, MAP.")
    ] = _MEASURES,
    threshold: Annotated[
        Literal["shared", "per_domain"], typer.Option(help="Of the pairs' F1.")
    ] = "shared",
    resamples: Annotated[
        int, typer.Option(min=0, help="Of the bootstrap intervals; 0 for none.")
    ] = 2000,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    domain: Annotated[
        str | None, typer.Option(help="Of texts whose file names none, for models with domains.")
    ] = None,
    query_prompt: Annotated[str | None, typer.Option(help="Put before queries, or a.")] = None,
    document_prompt: Annotated[str | None, typer.Option(help="Put before documents, or b.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    batch_size: BatchSize = 32,
    truncate: Truncate = False,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Measure a model on pairs, retrieval or STS: per domain and over all, with intervals."""
    from moe_fast.evaluation import Bootstrap, EncodeOptions, compare, format_table
    from moe_fast.files import atomic_write, check_output

    if pairs is None and retrieval is None and sts is None:
        raise typer.BadParameter("give --pairs, --retrieval or --sts, at least one")
    if dev is not None and pairs is None:
        raise typer.BadParameter("--dev goes with --pairs")
    if json_output is not None:
        check_output(json_output, overwrite)
    encode = EncodeOptions(
        batch_size=batch_size,
        truncate=truncate,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
        show_progress_bar=not run.quiet,
    )
    common = {"encode": encode, "bootstrap": Bootstrap(confidence, resamples, run.seed)}
    tasks = read_tasks(
        pairs=pairs,
        dev=dev,
        retrieval=retrieval,
        sts=sts,
        threshold=threshold,
        measures=split_commas(measures),
    )
    names = [model] if against is None else [model, against]
    found = [_measure(name, tasks, domain, device, common) for name in names]
    results: dict[str, Any] = {}
    for task in tasks:
        evaluations = [by_task[task] for by_task in found]
        comparisons = [compare(*evaluations)] if against is not None else []
        print(f"\n{task}\n{format_table(evaluations, comparisons, markdown=markdown)}", flush=True)
        results[task] = {
            "evaluations": [evaluation.to_dict() for evaluation in evaluations],
            "comparisons": [comparison.to_dict() for comparison in comparisons],
        }
    if json_output is not None:
        with atomic_write(json_output) as temporary:
            temporary.write_text(json.dumps(results, indent=2), encoding="utf-8")
        run.save_settings(json_output)


def read_tasks(
    *,
    pairs: Path | None,
    dev: Path | None,
    retrieval: Path | None,
    sts: Path | None,
    threshold: Literal["shared", "per_domain"],
    measures: list[str],
) -> dict[str, Callable[..., Evaluation]]:
    """{name: function of a model}; all data is read, and checked, before any model is loaded."""
    from functools import partial

    from moe_fast.data import read_pairs, read_retrieval, read_sts
    from moe_fast.evaluation import evaluate_pairs, evaluate_retrieval, evaluate_sts

    tasks: dict[str, Callable[..., Evaluation]] = {}
    if pairs is not None:
        tasks["pairs"] = partial(
            evaluate_pairs,
            dataset=read_pairs(pairs),
            dev=None if dev is None else read_pairs(dev),
            threshold=threshold,
        )
    if retrieval is not None:
        tasks["retrieval"] = partial(
            evaluate_retrieval, retrieval=read_retrieval(retrieval), measures=measures
        )
    if sts is not None:
        tasks["sts"] = partial(evaluate_sts, dataset=read_sts(sts))
    return tasks


def _measure(
    path: str,
    tasks: dict[str, Callable[..., Evaluation]],
    domain: str | None,
    device: str | None,
    common: dict[str, Any],
) -> dict[str, Evaluation]:
    """The evaluations of one model, which is not kept in memory."""
    from moe_fast.inference import load_model

    model = load_model(path, device=device)
    config = model.transformers_model.config
    if domain is not None and getattr(config, "domains", None):
        config.domain_id(domain)  # an unknown one is an error
        config.default_domain = domain
    return {task: measure(model, name=path, **common) for task, measure in tasks.items()}
