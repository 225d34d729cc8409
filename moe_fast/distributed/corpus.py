"""Embeds a corpus of Parquet files with Ray, so that killed workers and runs lose little.

A row group is the unit of work. A worker reads it, embeds it and writes its vectors to a Parquet
file of its own, completely or not at all. However often a worker is killed, and a row group begun
again by another one, it has one file in the end: each id is in the output once. To resume a run
that was killed, start it again with the same arguments.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from moe_fast.distributed.cluster import ray_cluster, run_job
from moe_fast.distributed.embedder import Embedder
from moe_fast.distributed.parts import CorpusParts, PartFolder, has_corpus_parts, open_corpus_parts
from moe_fast.distributed.row_groups import (
    EmbedJob,
    QuantizeJob,
    Reading,
    RowGroup,
    list_row_groups,
)
from moe_fast.encoding.lengths import TruncatedTexts
from moe_fast.encoding.model_paths import check_model_path
from moe_fast.extras import missing
from moe_fast.files import check_output, exclusive
from moe_fast.inference.embed import EmbeddedFile
from moe_fast.inference.manifest import describe_run
from moe_fast.inference.precision import Precision, StoredPrecision, needs_ranges
from moe_fast.inference.text_encoder import EncoderSettings, with_precision
from moe_fast.inference.threads import check_threads
from moe_fast.ops import backends
from moe_fast.ops.checks import check_count

Job = EmbedJob | QuantizeJob
Run = Callable[[Job, list[RowGroup]], Iterator[dict[str, Any]]]  # calls it with each row group


def embed_corpus(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: EncoderSettings,
    *,
    columns: tuple[str, ...] = ("text",),
    domain_column: str | None = None,
    id_column: str | None = None,
    chunk_size: int = 1024,
    workers: int = 1,
    threads: int | None = None,
    precision: Precision | None = None,
    address: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    finish: Callable[[], None] | None = None,
) -> EmbeddedFile:
    """Embed every text of a corpus of Parquet files; after an interruption, it resumes.

    All machines of the cluster must see the source, the model and the output under the same names,
    on a shared file system, and have this library installed.

    Args:
        source: a ``.parquet`` file, or a folder; all its ``.parquet`` files are read, also those in
            its subfolders, in the order of their paths.
        output: a folder, which appears when it is complete. It holds a file
            ``part-NUMBER.parquet`` with the columns ``id`` and ``embedding`` for each row group of
            the source, in its order. The ids are the source's ``id`` or ``_id``, or the numbers of
            the rows in the corpus from 0.
        settings: the model and how to call it.
        columns, domain_column, id_column: see :func:`moe_fast.data.read_texts`.
        chunk_size: the number of texts that are tokenized together.
        workers: the most processes that embed, each with a copy of the model.
        threads: PyTorch's threads of each worker. ``None``: those of the interrupted run or, for a
            new one, PyTorch's number divided by `workers`; on a cluster that is there, 1.
        precision: as for :func:`moe_fast.inference.embed_file`.
        address: that of a Ray cluster, or "auto". ``None``: the cluster to which this program is
            connected, or else one on this machine, which is started and ended.
        overwrite: replace an existing `output`, and discard the files of an unfinished run with
            other settings.
        progress: show a progress bar that counts texts.
        finish: called when the output is complete, to write further files that belong to it; called
            again if the run is killed before its end.

    Raises:
        FileExistsError: `output` exists, or an interrupted run with other settings has left its
            files, unless `overwrite`.
        FileNotFoundError: the source or the model does not exist.
        NotADirectoryError: `output` is a file.
        ValueError, TypeError: a setting or a text is invalid; the error names the file and the row.
        ImportError: Ray is not installed.
        RuntimeError: another run is writing `output`, or the workers died again and again.
    """
    check_count("chunk_size", chunk_size)
    check = check_threads if address is None else check_count  # a cluster has processors of its own
    check("workers", workers)
    check("threads", 1 if threads is None else threads)
    if settings.domain is not None and domain_column is not None:
        raise ValueError(
            "give domain or domain_column, not both; got "
            f"domain={settings.domain!r} and domain_column={domain_column!r}"
        )
    settings, precision = with_precision(settings, precision)
    check_model_path(settings.model)
    source, output = Path(source).resolve(), Path(output).absolute()
    begun = has_corpus_parts(output)
    check_output(output, overwrite or begun)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} must be a folder; it is a file.")
    if importlib.util.find_spec("ray") is None:  # it is imported when its settings are made
        raise missing("ray", "ray", "embed_corpus")
    reading = Reading(tuple(columns), domain_column, id_column)
    with exclusive(output):
        groups, fingerprint = list_row_groups(source, reading)
        parts = open_corpus_parts(
            output,
            describe_run(
                settings,
                source=fingerprint,
                precision=precision,
                chunk_size=chunk_size,
                **asdict(reading),
            ),
            threads=threads,
            default_threads=1 if address else max(1, torch.get_num_threads() // workers),
            overwrite=overwrite,
        )
        resumed, truncated = sum(group.rows for group in groups), TruncatedTexts()
        if not (begun and parts.are_in_output(groups)):
            check_output(output, overwrite)
            job = EmbedJob(
                _embedder(settings, precision, domain_column, parts.threads),
                reading,
                parts.vectors,
                with_ranges=needs_ranges(precision),
                chunk_size=chunk_size,
                backend=backends.default,
            )
            with _running(address, workers, parts.threads, settings.device) as run:
                resumed = _embed(job, groups, parts, run, truncated, progress)
            parts.publish()
        dimension = parts.in_output.dimension(groups[0])
        if finish is not None:
            finish()
        parts.remove()
    rows = sum(group.rows for group in groups)
    return EmbeddedFile(output, rows, dimension, resumed, truncated.num_long)


def _embedder(
    settings: EncoderSettings, precision: Precision, domain_column: str | None, threads: int
) -> Embedder:
    """Make the workers' callable; with ranges still to be found, it computes float32."""
    folder = Path(settings.model)
    return Embedder(
        str(folder.resolve()) if folder.is_dir() else settings.model,
        domain=domain_column or settings.domain,
        precision="float32" if needs_ranges(precision) else precision,
        prompt_name=settings.prompt_name,
        normalize=settings.normalize,
        truncate=settings.truncate,
        batch_size=settings.batch_size,
        threads=threads,
        device=settings.device,
    )


@contextmanager
def _running(address: str | None, workers: int, threads: int, device: str | None) -> Iterator[Run]:
    """Yield a function that runs a job on a cluster."""
    with ray_cluster(address, workers * threads) as ray:
        has_gpu = ray.cluster_resources().get("GPU", 0) > 0
        gpus = 1 if (has_gpu if device is None else device.startswith("cuda")) else 0

        def run(job: Job, groups: list[RowGroup]) -> Iterator[dict[str, Any]]:
            items = [asdict(group) for group in groups]
            return run_job(ray, job, items, workers=workers, num_cpus=threads, num_gpus=gpus)

        yield run


def _embed(
    job: EmbedJob,
    groups: list[RowGroup],
    parts: CorpusParts,
    run: Run,
    truncated: TruncatedTexts,
    progress: bool,
) -> int:
    """Embed all row groups; return the number of rows that an earlier run had embedded."""
    missing = [group for group in groups if not parts.vectors.holds(group)]
    rows, left = (sum(group.rows for group in part) for part in (groups, missing))
    if missing:  # what was quantised with the ranges of other vectors
        parts.quantized.clear()
        parts.vectors.forget_begun()
    with tqdm(
        total=rows, initial=rows - left, unit=" texts", desc="embed", disable=not progress
    ) as bar:
        for result in run(job, missing):
            if result["error"]:
                raise ValueError(result["error"])
            truncated.add(result["long"], result["limit"] or None)
            bar.update(result["rows"])
    truncated.warn(left)
    _check_complete(parts.vectors, groups)
    if needs_ranges(parts.precision):
        dimension = parts.vectors.dimension(groups[0])
        stored = StoredPrecision(parts.precision, dimension, parts.vectors.ranges(groups))
        quantize = QuantizeJob(parts.vectors, parts.quantized, stored)
        for _ in run(quantize, [group for group in groups if not parts.quantized.holds(group)]):
            pass
        _check_complete(parts.quantized, groups)
    return rows - left


def _check_complete(folder: PartFolder, groups: list[RowGroup]) -> None:
    lacking = [group.number for group in groups if not folder.holds(group)]
    if lacking:
        raise RuntimeError(
            f"{folder.path} lacks the files of {len(lacking):,} row groups, the first of them "
            f"{lacking[0]}, that workers have written. Do all machines see this folder?"
        )
