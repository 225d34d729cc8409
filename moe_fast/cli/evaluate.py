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


def run_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a model, or its id on the Hugging Face hub; none with --run.",
        ),
    ] = None,
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
            "Folder in BEIR's, MIRACL's or MLDR's layout, or a .json or .json.gz file of corpus, "
            "queries and qrels; DOMAIN=FOLDER gives all of its texts that domain.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        option(_DATA, "Split of --retrieval; by default the only one with judgements, or test."),
    ] = None,
    corpus: Annotated[
        Path | None,
        option(
            _DATA,
            "Documents, where a set's files are in different places: .jsonl(.gz), or a folder of "
            "docs-*.jsonl(.gz). With --queries and --qrels, instead of --retrieval.",
        ),
    ] = None,
    queries: Annotated[
        Path | None, option(_DATA, "Queries: .jsonl(.gz), or .tsv(.gz) of id and text.")
    ] = None,
    qrels: Annotated[
        Path | None,
        option(
            _DATA,
            "Judgements: TREC's four columns (query, Q0, document, relevance), or BEIR's three.",
        ),
    ] = None,
    run_file: Annotated[
        Path | None,
        option(
            _DATA,
            "Score this TREC run file, such as pyserini's, instead of a model's hits; with --qrels "
            "or --retrieval.",
            "--run",
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
            help="Folder or hub id of another model (with --run: another run file); shows the "
            "differences from it, paired by query or pair."
        ),
    ] = None,
    json_output: Annotated[
        Path | None,
        typer.Option("--json", help="File to write all numbers to: .json or .json.gz."),
    ] = None,
    measures: Annotated[
        list[str] | None,
        option(
            _RETRIEVAL,
            "Measures: nDCG@k, MRR@k, Recall@k, MAP@k, or MAP (of the first 1000); by default "
            "nDCG@10,MRR@10,Recall@10, of a run file nDCG@5,nDCG@10,Recall@100.",
        ),
    ] = None,
    ignore_identical_ids: Annotated[
        bool | None,
        option(
            _RETRIEVAL,
            "Leave out of a query's hits the document with the query's own id; by default of a "
            "model's hits, as BEIR does, and not of a run file's, as trec_eval.",
            "--ignore-identical-ids/--keep-identical-ids",
        ),
    ] = None,
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
    """Measure a model on pairs, retrieval or STS, or a run file: with intervals."""
    from moe_fast.evaluation import Bootstrap, EncodeOptions, compare, format_table
    from moe_fast.files import check_output

    _check_data(SimpleNamespace(**run.settings))
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
    first = str(model if run_file is None else run_file)
    names = [first] if against is None else [first, against]
    if run_file is None:
        found = [_measure(name, tasks, domain, device, common) for name in names]
    else:
        found = [_score_run(name, tasks, common["bootstrap"]) for name in names]
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


def _check_data(options: SimpleNamespace) -> None:
    """Raise typer.BadParameter unless the options say what to measure, and on what."""
    files = [name for name in ("corpus", "queries") if getattr(options, name) is not None]
    if options.run_file is not None:
        given = [name for name in ("model", "pairs", "dev", "sts") if getattr(options, name)]
        if given + files or (options.qrels is None) == (options.retrieval is None):
            raise typer.BadParameter(
                "--run takes --qrels FILE or --retrieval FOLDER, one of the two, and no model, "
                f"--corpus, --queries, --pairs or --sts; got {', '.join(given + files) or 'none'}"
            )
    elif options.model is None:
        raise typer.BadParameter("give a MODEL, or a run file by --run")
    elif not (options.pairs or options.retrieval or options.sts or options.qrels or files):
        raise typer.BadParameter(
            "give --pairs, --retrieval or --sts, at least one; or --corpus, --queries and --qrels"
        )
    elif (files or options.qrels) and not (len(files) == 2 and options.qrels):
        raise typer.BadParameter("give --corpus, --queries and --qrels together")
    elif files and options.retrieval:
        raise typer.BadParameter("give --retrieval, or --corpus, --queries and --qrels")
    if options.split is not None and options.retrieval is None:
        raise typer.BadParameter("--split goes with --retrieval")


def _read_tasks(options: SimpleNamespace) -> dict[str, Callable[..., Evaluation]]:
    """Read and check all data, before any model is loaded, and return {task: its evaluation}.

    An evaluation is a function of a model. ``options`` are the command's parameters.
    """
    from moe_fast.cli.training_data import read_sources, reading_of
    from moe_fast.data import read_pairs, read_sts
    from moe_fast.evaluation import evaluate_pairs, evaluate_sts

    reading = reading_of(options)
    tasks: dict[str, Callable[..., Evaluation]] = {}
    if options.pairs:
        tasks["pairs"] = partial(
            evaluate_pairs,
            dataset=read_sources(options.pairs, read_pairs, **reading),
            dev=read_sources(options.dev, read_pairs, **reading) if options.dev else None,
            threshold=options.threshold,
        )
    if options.retrieval is not None or options.qrels is not None:
        tasks["retrieval"] = _retrieval_task(options)
    if options.sts:
        tasks["sts"] = partial(evaluate_sts, dataset=read_sources(options.sts, read_sts, **reading))
    return tasks


def _retrieval_task(options: SimpleNamespace) -> Callable[..., Evaluation]:
    """Read the retrieval set, or the judgements alone, and return how to score a model or a run."""
    from moe_fast.data import read_qrels
    from moe_fast.evaluation import evaluate_qrels, evaluate_retrieval, evaluate_run
    from moe_fast.evaluation.retrieval import MEASURES, RUN_MEASURES

    of_run = options.run_file is not None
    measures = split_commas(options.measures) or list(RUN_MEASURES if of_run else MEASURES)
    own = options.ignore_identical_ids
    common: dict[str, Any] = {"measures": measures}
    common["ignore_identical_ids"] = not of_run if own is None else own
    if of_run and options.qrels is not None:
        return partial(evaluate_qrels, qrels=read_qrels(options.qrels), **common)
    retrieval = _read_retrieval(options)
    return partial(evaluate_run if of_run else evaluate_retrieval, retrieval=retrieval, **common)


def _read_retrieval(options: SimpleNamespace) -> Retrieval:
    """Read a retrieval set from FOLDER, FILE or three files; DOMAIN=FOLDER gives a domain."""
    from moe_fast.data import read_retrieval, read_retrieval_files
    from moe_fast.data.sources import split_domain

    lenient: dict[str, Any] = {"on_missing": options.on_missing}
    if options.retrieval is None:
        return read_retrieval_files(options.corpus, options.queries, options.qrels, **lenient)
    source = options.retrieval
    domain, path = split_domain(source)
    found = read_retrieval(path, split=options.split, **lenient)
    if domain is None:
        return found
    if found.domains is not None or found.corpus_domains is not None:
        raise ValueError(f"{source}: the set names its texts' domains already")
    return replace(
        found,
        domains=dict.fromkeys(found.queries, domain),
        corpus_domains=dict.fromkeys(found.corpus, domain),
    )


def _score_run(
    path: str, tasks: dict[str, Callable[..., Evaluation]], bootstrap: Any
) -> dict[str, Evaluation]:
    """Read a run file, and return its evaluation."""
    from moe_fast.evaluation import read_run

    hits = read_run(path)
    return {task: score(hits, name=path, bootstrap=bootstrap) for task, score in tasks.items()}


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
