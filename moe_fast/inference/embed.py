"""Embeds a file of any size, with several processes, so that an interrupted run can be resumed.

The texts are divided into chunks of equal size. The vectors of each chunk are written to a file of
their own in ``OUTPUT.parts``, completely or not at all, beside a manifest with the settings of the
run. To resume a run that was killed, start it again with the same arguments: chunks that exist are
not computed again. While a run is alive, a second run with the same output is refused. Every chunk
is computed in the same way (model, batches and threads) in any process, so that the result has the
same bytes whether the run was interrupted or not. At the end the chunks are copied into the output
one by one, and removed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from moe_fast.data.lines import Refuse, refuse
from moe_fast.data.tables import Skipped
from moe_fast.data.texts import TextRow, read_texts
from moe_fast.encoding.lengths import TruncatedTexts, counted_truncation
from moe_fast.encoding.model_paths import file_sha256
from moe_fast.files import check_output, exclusive
from moe_fast.inference.chunks import (
    Chunk,
    EmbeddedChunk,
    domains_of_rows,
    embed_chunk,
    tokenized_ahead,
)
from moe_fast.inference.manifest import describe_run
from moe_fast.inference.parts import Parts, has_parts, open_parts
from moe_fast.inference.precision import Precision
from moe_fast.inference.text_encoder import (
    EncoderSettings,
    TextEncoder,
    torch_threads,
    with_precision,
)
from moe_fast.inference.threads import check_threads
from moe_fast.inference.vectors import check_vector_format, write_vectors
from moe_fast.inference.workers import embed_in_workers
from moe_fast.ops.checks import check_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedFile:
    """The result of :func:`embed_file`.

    Attributes:
        path: the output.
        rows, dimension: the shape of the vectors.
        resumed_rows: the number of rows that an earlier, interrupted run had computed.
        truncated_rows: the number of texts that this run truncated, see
            ``EncoderSettings.truncate``.
    """

    path: Path
    rows: int
    dimension: int
    resumed_rows: int
    truncated_rows: int = 0


def embed_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    settings: EncoderSettings,
    *,
    columns: tuple[str, ...] = ("text",),
    domain_column: str | None = None,
    id_column: str | None = None,
    delimiter: str | None = None,
    skip_invalid: bool = False,
    chunk_size: int = 1024,
    processes: int = 1,
    threads: int | None = None,
    precision: Precision | None = None,
    overwrite: bool = False,
    progress: bool = True,
    finish: Callable[[], None] | None = None,
) -> EmbeddedFile:
    """Embed every text of a file; called again after an interruption, it resumes.

    The file is read once before any text is embedded, so that a broken line at its end is reported
    at once.

    Args:
        source: a ``.txt``, ``.jsonl``, ``.csv`` or ``.tsv`` file, also with ``.gz`` appended, or a
            ``.parquet`` file.
        output: a ``.npy`` file with an array [N, d], and the ids in a file beside it (see
            :mod:`moe_fast.inference.vectors`), or a ``.parquet`` file with the columns ``id`` and
            ``embedding``, lists of fixed size, as vector stores load it. The ids are the source's
            ``id`` or ``_id``, or the row numbers from 0.
        settings: the model and how to call it.
        columns, domain_column, id_column, delimiter: see
            :func:`moe_fast.data.read_texts`.
        skip_invalid: leave out rows that cannot be read, and warn how many there were and what is
            wrong with the first ones. By default the first such row is an error.
        chunk_size: texts per chunk. If the run is killed, each process loses at most one chunk.
        processes: the number of processes that embed, each with a copy of the model.
        threads: PyTorch's threads in each process. ``None``: those of the interrupted run or, for a
            new run, PyTorch's default divided by `processes`. The number of threads may change the
            last bit of the result; the number of processes does not.
        precision: what the output stores, see :mod:`moe_fast.inference.precision`; ``int8`` and
            ``uint8`` divide the ranges of all vectors. Other precisions than floating-point numbers
            need ``.parquet``. ``None``: ``settings.dtype``.
        overwrite: replace an existing `output`, and discard the chunks of a run with other
            settings.
        progress: show a progress bar that counts texts.
        finish: called when the output is complete and before the chunks are removed, to write
            further files that belong to it. If the run is killed before the end of this call, it is
            called again when the run is resumed.

    Raises:
        FileExistsError: `output` exists, unless `overwrite`.
        FileExistsError: an interrupted run with other settings has left its chunks, unless
            `overwrite`; the error names what differs.
        FileNotFoundError: the source or the model does not exist.
        ValueError, TypeError: a setting is invalid.
        ValueError: there are no texts, or a text is invalid; the error names the file and the line.
        RuntimeError: another run is writing `output`, or a worker process died.
    """
    check_count("chunk_size", chunk_size)
    check_threads("processes", processes)
    check_threads("threads", 1 if threads is None else threads)
    source, output = Path(source), Path(output)
    settings, precision = with_precision(settings, precision)
    check_vector_format(output, precision)
    # If there are chunks, the output may be that of this run, killed before it removed them.
    check_output(output, overwrite or has_parts(output))
    if settings.domain is not None and domain_column is not None:
        raise ValueError(
            "give domain or domain_column, not both; got "
            f"domain={settings.domain!r} and domain_column={domain_column!r}"
        )
    reading: dict[str, Any] = {
        "columns": columns,
        "domain_column": domain_column,
        "id_column": id_column,
        "delimiter": delimiter,
    }
    with exclusive(output):
        skipped = Skipped(str(source))
        first, count, domains = _look_through(source, reading, skipped if skip_invalid else refuse)
        if skipped.count:
            logger.warning("%s: %s", source, skipped.summary())
        encoder = TextEncoder(settings)
        encoder.check_domains(sorted(domains))
        # One text shows whether any can be embedded, before anything is written.
        with counted_truncation():  # no warning here: the text is counted with its chunk
            dimension = encoder.encode([first.text], domains_of_rows([first])).shape[1]
        sizes = [min(chunk_size, count - start) for start in range(0, count, chunk_size)]
        parts = open_parts(
            output,
            describe_run(
                settings,
                source=file_sha256(source),
                output=output.suffix,
                precision=precision,
                chunk_size=chunk_size,
                skip_invalid=skip_invalid,
                **reading,
            ),
            (dimension, settings.dtype),
            threads=threads,
            default_threads=max(1, torch.get_num_threads() // processes),
            overwrite=overwrite,
        )
        computed, truncated = 0, TruncatedTexts()
        if not parts.are_in_output(sizes, precision):
            check_output(output, overwrite)
            again = Skipped(str(source)) if skip_invalid else refuse  # the warning is given above
            chunks = _chunks(read_texts(source, **reading, invalid=again), chunk_size)
            with tqdm(total=count, unit=" texts", desc="embed", disable=not progress) as bar:
                missing = _missing(chunks, parts, bar)
                if processes == 1:
                    finished = _in_this_process(missing, encoder, parts)
                else:
                    del encoder  # the workers load their own
                    finished = embed_in_workers(missing, settings, parts, processes)
                for size, cut in finished:
                    bar.update(size)
                    computed += size
                    truncated.add(cut.num_long, cut.limit)
            truncated.warn(computed)
            stored = parts.stored(len(sizes), precision)
            write_vectors(output, parts.read(len(sizes)), (count, dimension), stored)
        if finish is not None:
            finish()
        parts.remove()
    return EmbeddedFile(output, count, dimension, count - computed, truncated.num_long)


def _look_through(
    source: Path, reading: dict[str, Any], invalid: Refuse
) -> tuple[TextRow, int, set[str]]:
    """Check every row, and return the first text, the number of texts and the domains' names.

    Raises:
        ValueError: there are no texts, or `invalid` raises for a row.
    """
    first, count, domains = None, 0, set()
    for row in read_texts(source, **reading, invalid=invalid):
        first = first or row
        count += 1
        if row.domain is not None:
            domains.add(row.domain)
    if first is None:
        skipped = f" ({invalid.summary()})" if isinstance(invalid, Skipped) else ""
        raise ValueError(f"{source}: no texts in this file{skipped}")
    return first, count, domains


def _chunks(rows: Iterator[TextRow], size: int) -> Iterator[Chunk]:
    for number in itertools.count():
        texts = list(itertools.islice(rows, size))
        if not texts:
            return
        yield Chunk(number, texts)


def _missing(chunks: Iterable[Chunk], parts: Parts, bar: Any) -> Iterator[Chunk]:
    """Yield the chunks that an earlier run did not finish, and add the others to the bar."""
    for chunk in chunks:
        if parts.holds(chunk.number, len(chunk.rows)):
            bar.update(len(chunk.rows))
            bar.initial = bar.n  # leave them out of the rate
        else:
            yield chunk


def _in_this_process(
    chunks: Iterable[Chunk], encoder: TextEncoder, parts: Parts
) -> Iterator[EmbeddedChunk]:
    """Embed the chunks one by one, and yield each result."""
    with (
        torch_threads(parts.threads),
        contextlib.closing(tokenized_ahead(encoder, chunks)) as ahead,
    ):
        for chunk, tokenized in ahead:
            yield embed_chunk(encoder, parts, chunk, tokenized)
