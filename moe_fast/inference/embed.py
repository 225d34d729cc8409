"""embed_file: the embeddings of a file of any size, on several processes, resumable at any point.

The texts are cut into chunks of equal size. Each chunk's vectors go to a file of their own in
``OUTPUT.parts``, written whole or not at all, beside a manifest of what is being computed. A run
that was killed is started again with the same arguments: chunks that are there are not computed
again, and one that was killed while it cleaned up ends that. A second run with the same output is
refused meanwhile. Chunk i holds the same texts and is computed in the same way (same model, batches
and threads) whichever process does it and whenever, so the result has the same bytes however often
the run was stopped. At the end the chunks are copied into the output one by one.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from moe_fast.data.lines import Refuse, refuse
from moe_fast.data.tables import Skipped
from moe_fast.data.texts import TextRow, read_texts
from moe_fast.encoding.lengths import TruncatedTexts, counted_truncation
from moe_fast.encoding.model_paths import file_sha256, model_fingerprint
from moe_fast.files import check_output, exclusive
from moe_fast.inference.chunks import Chunk, EmbeddedChunk, domains_of_rows, embed_chunk
from moe_fast.inference.parts import Parts, has_parts, open_parts
from moe_fast.inference.text_encoder import EncoderSettings, TextEncoder, torch_threads
from moe_fast.inference.threads import check_threads
from moe_fast.inference.vectors import check_vector_format, write_vectors
from moe_fast.inference.workers import embed_in_workers
from moe_fast.ops.checks import check_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedFile:
    """What :func:`embed_file` did.

    Attributes:
        path: the output.
        rows, dimension: its shape.
        resumed_rows: rows that an earlier, interrupted run had computed.
        truncated_rows: texts that this run cut, see ``EncoderSettings.truncate``.
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
    overwrite: bool = False,
    progress: bool = True,
    finish: Callable[[], None] | None = None,
) -> EmbeddedFile:
    """Embed every text of a file; start it again after an interruption and it goes on.

    The file is read through once before any text is embedded, so that a broken line at its end is
    reported at once.

    Args:
        source: ``.txt``, ``.jsonl``, ``.csv`` (also ``.gz``) or ``.parquet``.
        output: ``.npy``, an array [N, d], with the ids beside it (see
            :mod:`moe_fast.inference.vectors`), or ``.parquet`` with the columns ``id`` and
            ``embedding``. Ids are the source's ``id`` or ``_id``, else the row number from 0, as
            text.
        settings: the model and how to call it.
        columns, domain_column, id_column, delimiter: see
            :func:`moe_fast.data.read_texts`.
        skip_invalid: leave out rows that cannot be read, with a warning that counts them and names
            the first; otherwise the first one is an error.
        chunk_size: texts per chunk: what a kill can lose, per process.
        processes: how many embed at the same time, each with a copy of the model.
        threads: of PyTorch in each process. ``None``: those of the interrupted run; on a new one
            PyTorch's own number divided by `processes`. Results may differ in the last bit
            between numbers of threads, and in nothing between numbers of processes.
        overwrite: replace an `output` that exists, and what is left of a run with other settings.
        progress: show a bar that counts texts.
        finish: called when the output is there and before the chunks go, for what else belongs to
            it: a run that was killed before its end calls it when it is started again.

    Raises:
        FileExistsError: `output` exists; an interrupted run with other settings left its chunks.
            The message names what differs.
        FileNotFoundError: no such source or model.
        ValueError: bad settings or texts, with the file and line; no texts.
        RuntimeError: another run is writing `output`; a worker process died.
    """
    check_count("chunk_size", chunk_size)
    check_threads("processes", processes)
    check_threads("threads", 1 if threads is None else threads)
    source, output = Path(source), Path(output)
    check_vector_format(output)
    # With chunks beside it the output may be this very run's, killed before it had cleaned up.
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
        with counted_truncation():  # it is counted where it is embedded
            dimension = encoder.encode([first.text], domains_of_rows([first])).shape[1]
        sizes = [min(chunk_size, count - start) for start in range(0, count, chunk_size)]
        parts = open_parts(
            output,
            _manifest(
                source, settings, {**reading, "skip_invalid": skip_invalid}, chunk_size, output
            ),
            (dimension, settings.dtype),
            threads=threads,
            default_threads=max(1, torch.get_num_threads() // processes),
            overwrite=overwrite,
        )
        computed, truncated = 0, TruncatedTexts()
        if not parts.are_in_output(sizes):
            check_output(output, overwrite)
            again = Skipped(str(source)) if skip_invalid else refuse  # said above
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
            write_vectors(output, parts.read(len(sizes)), (count, dimension))
        if finish is not None:
            finish()
        parts.remove()
    return EmbeddedFile(output, count, dimension, count - computed, truncated.num_long)


def _look_through(
    source: Path, reading: dict[str, Any], invalid: Refuse
) -> tuple[TextRow, int, set[str]]:
    """The first text, the number of texts and the domains' names; every row is checked."""
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


def _manifest(
    source: Path, settings: EncoderSettings, reading: dict[str, Any], chunk_size: int, output: Path
) -> dict[str, Any]:
    """All that the vectors depend on, but the number of threads; ``truncate`` only adds vectors."""
    import sentence_transformers
    import transformers

    from moe_fast.version import __version__

    chosen = asdict(settings)
    for name in ("model", "truncate"):
        chosen.pop(name)
    return {
        "source": file_sha256(source),
        "model": model_fingerprint(settings.model),
        "output": output.suffix,
        "chunk_size": chunk_size,
        **{name: list(v) if isinstance(v, tuple) else v for name, v in reading.items()},
        **chosen,
        "versions": {
            "moe_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentence_transformers": sentence_transformers.__version__,
        },
    }


def _chunks(rows: Iterator[TextRow], size: int) -> Iterator[Chunk]:
    for number in itertools.count():
        texts = list(itertools.islice(rows, size))
        if not texts:
            return
        yield Chunk(number, texts)


def _missing(chunks: Iterable[Chunk], parts: Parts, bar: Any) -> Iterator[Chunk]:
    """The chunks that an earlier run did not finish; the bar passes over the others."""
    for chunk in chunks:
        if parts.holds(chunk.number, len(chunk.rows)):
            bar.update(len(chunk.rows))
            bar.initial = bar.n  # the rate counts what is computed now
        else:
            yield chunk


def _in_this_process(
    chunks: Iterable[Chunk], encoder: TextEncoder, parts: Parts
) -> Iterator[EmbeddedChunk]:
    """The chunks as they get done."""
    with torch_threads(parts.threads):
        for chunk in chunks:
            yield embed_chunk(encoder, parts, chunk)
