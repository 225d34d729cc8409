"""``moe-fast evaluate``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moe_fast.cli.command import Run
from moe_fast.cli.options import (
    BatchSize,
    Columns,
    Delimiter,
    Device,
    ModelArgument,
    Overwrite,
    SkipInvalid,
    Truncate,
    check_delimiter,
    option,
    split_commas,
)
from moe_fast.cli.outputs import write_json

if TYPE_CHECKING:
    from moe_fast.data import Retrieval
    from moe_fast.evaluation import Evaluation

EXAMPLE = "moe-fast evaluate mixture --pairs pairs.jsonl --against other-mixture --json scores.json"
_DATA = "What to measure on"
_RETRIEVAL, _NUMBERS = "Retrieval", "Numbers"
_MEASURES = ["nDCG@10,MRR@10,Recall@10"]


def run_command(
    model: ModelArgument,
    *,
    pairs: Annotated[
        list[str] | None,
        option(
            _DATA,
            "File or dataset of pairs, with labels 0 and 1 or with positives only; DOMAIN=FILE "
            "gives all of them that domain. May be given several times.",
        ),
    ] = None,
    dev: Annotated[
        list[str] | None,
        option(
            _DATA,
            "File or dataset of labelled pairs, as for --pairs, on which the threshold of the "
            "accuracy is chosen.",
        ),
    ] = None,
    retrieval: Annotated[
        str | None,
        option(
            _DATA,
            "Folder in BEIR's layout, or a .json or .json.gz file of corpus, queries and qrels; "
            "DOMAIN=FOLDER gives all of its texts that domain.",
        ),
    ] = None,
    sts: Annotated[
        list[str] | None,
        option(
            _DATA,
            "File or dataset of sentence pairs with a score each, on any scale; DOMAIN=FILE. May "
            "be given several times.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of another model; shows the differences from it, paired by "
            "query or pair."
        ),
    ] = None,
    json_output: Annotated[
        Path | None,
        typer.Option("--json", help="File to write all numbers to: .json or .json.gz."),
    ] = None,
    measures: Annotated[
        list[str],
        option(_RETRIEVAL, "Measures: nDCG@k, MRR@k, Recall@k, MAP@k, or MAP (of the first 1000)."),
    ] = _MEASURES,
    ignore_identical_ids: Annotated[
        bool,
        option(
            _RETRIEVAL,
            "Leave out of a query's hits the document with the query's own id, as BEIR does.",
            "--ignore-identical-ids/--keep-identical-ids",
        ),
    ] = True,
    on_missing: Annotated[
        Literal["error", "drop"],
        option(
            _RETRIEVAL,
            "Whether judgements of documents or queries that do not exist are an error, or are "
            "dropped and counted.",
        ),
    ] = "error",
    threshold: Annotated[
        Literal["shared", "per_domain"],
        option(_NUMBERS, "Whether the pairs' F1 has one cosine as threshold, or one per domain."),
    ] = "shared",
    resamples: Annotated[
        int, option(_NUMBERS, "Resamples of the bootstrap intervals; 0 for no intervals.", min=0)
    ] = 2000,
    confidence: Annotated[
        float, option(_NUMBERS, "Confidence of the intervals, between 0 and 1.")
    ] = 0.95,
    domain: Annotated[
        str | None,
        typer.Option(
            help="Domain of the texts that have none, for a model with domains; other models "
            "ignore it."
        ),
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(help="Text to put before every query (before a, of pairs).")
    ] = None,
    document_prompt: Annotated[
        str | None, typer.Option(help="Text to put before every document (before b, of pairs).")
    ] = None,
    columns: Columns = None,
    delimiter: Delimiter = None,
    skip_invalid: SkipInvalid = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown.")
    ] = False,
    batch_size: BatchSize = 32,
    truncate: Truncate = True,
    device: Device = None,
    overwrite: Overwrite = False,
    run: Run,
) -> None:
    """Measure a model on pairs, retrieval or STS: per domain and over all, with intervals."""
    from moe_fast.evaluation import Bootstrap, EncodeOptions, compare, format_table
    from moe_fast.files import check_output

    if not pairs and retrieval is None and not sts:
        raise typer.BadParameter("give --pairs, --retrieval or --sts, at least one")
    if dev and not pairs:
        raise typer.BadParameter("--dev goes with --pairs")
    check_delimiter(delimiter, [*(pairs or ()), *(dev or ()), *(sts or ())])
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
    tasks = _read_tasks(SimpleNamespace(**run.settings))
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
        run.save_settings(json_output)
        write_json(results, json_output)


def _read_tasks(options: SimpleNamespace) -> dict[str, Callable[..., Evaluation]]:
    """Read and check all data, before any model is loaded, and return {task: its evaluation}.

    An evaluation is a function of a model. ``options`` are the command's parameters.
    """
    from moe_fast.cli.training_data import read_sources, reading_of
    from moe_fast.data import read_pairs, read_sts
    from moe_fast.evaluation import evaluate_pairs, evaluate_retrieval, evaluate_sts

    reading = reading_of(options)
    tasks: dict[str, Callable[..., Evaluation]] = {}
    if options.pairs:
        tasks["pairs"] = partial(
            evaluate_pairs,
            dataset=read_sources(options.pairs, read_pairs, **reading),
            dev=read_sources(options.dev, read_pairs, **reading) if options.dev else None,
            threshold=options.threshold,
        )
    if options.retrieval is not None:
        tasks["retrieval"] = partial(
            evaluate_retrieval,
            retrieval=_read_retrieval(options.retrieval, options.on_missing),
            measures=split_commas(options.measures),
            ignore_identical_ids=options.ignore_identical_ids,
        )
    if options.sts:
        tasks["sts"] = partial(evaluate_sts, dataset=read_sources(options.sts, read_sts, **reading))
    return tasks


def _read_retrieval(source: str, on_missing: Literal["error", "drop"]) -> Retrieval:
    """Read a retrieval set from FOLDER or FILE; DOMAIN=FOLDER gives its texts that domain."""
    from moe_fast.data import read_retrieval
    from moe_fast.data.sources import split_domain

    domain, path = split_domain(source)
    found = read_retrieval(path, on_missing=on_missing)
    if domain is None:
        return found
    if found.domains is not None or found.corpus_domains is not None:
        raise ValueError(f"{source}: the set names its texts' domains already")
    return replace(
        found,
        domains=dict.fromkeys(found.queries, domain),
        corpus_domains=dict.fromkeys(found.corpus, domain),
    )


def _measure(
    path: str,
    tasks: dict[str, Callable[..., Evaluation]],
    domain: str | None,
    device: str | None,
    common: dict[str, Any],
) -> dict[str, Evaluation]:
    """Load a model, and return its evaluations; the model is not kept in memory."""
    from moe_fast.inference import load_model
    from moe_fast.models.configuration import AUTO
    from moe_fast.models.domain_predictor import predictor_of

    model = load_model(path, device=device)
    config = model.transformers_model.config
    if domain is not None and getattr(config, "domains", None):
        if domain == AUTO:
            predictor_of(model.transformers_model)  # an error where there is none
        else:
            config.domain_id(domain)  # an unknown one is an error
        config.default_domain = domain
    return {task: measure(model, name=path, **common) for task, measure in tasks.items()}
