"""Embedding by five experts beside the dense model in the runtimes that people pick on a CPU.

    python -m bench.embedding_peers bfloat16 --data FILE --json bench/results/cpu-NAME.json

- ``moe_fast``: a mixture of five experts made from all-MiniLM-L6-v2, enforced routing, the texts'
  domains in turn; ``MoESentenceTransformer.encode``.
- ``sentence-transformers``, ``ONNX Runtime``, ``OpenVINO``: the dense model, see
  :mod:`bench.runtimes`.

As upcycled, the experts are equal: every candidate must give the dense model's vectors, and the
least cosine to those in float32 is in the record. All have the same threads and the same texts, cut
to 256 tokens, and tokenizing is timed. Each has its best number of texts per batch, and of batches
at a time, which share the threads; in PyTorch these are computed in Python threads.

1,000 texts take minutes per round, so a round is made of pieces whose times are added: texts are
sorted by length, and blocks of them are dealt to the pieces, so that batches are those of all
texts. A run stops before ``--seconds`` are over; the next continues where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moe_fast
from moe_fast.ops import native

from .cases import OURS, WrongResult
from .embedding import DATA, MAX_TOKENS, pretrained, read_pairs
from .embedding_quality import quality
from .harness import ROOT, environment, summarize, write_json
from .machine import processor_share
from .record import Record, Row, append
from .runtimes import FORMS, Embed, Exports, encoder, versions

Encode = Callable[[Sequence[str]], Tensor]

EXPERTS, CALIBRATION = 5, 100
DOMAINS = [f"domain {number}" for number in range(EXPERTS)]
BATCHES, STREAMS = (16, 32, 64), (1, 2)
"""What each candidate may choose from."""
BLOCK, PIECES = 64, 4
DENSE = "sentence-transformers"
OURS_BFLOAT16 = "moe_fast, bfloat16"
LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.99, "int8": 0.8}
"""Below, a candidate computes something else."""
LOCAL = ROOT / "bench" / "results" / "local"


@dataclass(frozen=True)
class Candidate:
    """A candidate before its settings are chosen.

    Attributes:
        load: returns its encoder for so many texts per batch, and so many batches at a time.
        streams: the numbers of batches at a time to choose from.
    """

    load: Callable[[int, int], Encode]
    streams: tuple[int, ...] = (1,)


# --- candidates ----------------------------------------------------------------------------------


def candidates(precision: str, exports: Exports) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Return the candidates at one precision, and why others cannot run, by name."""
    threads = torch.get_num_threads()
    found: dict[str, Candidate] = {}
    absent: dict[str, str] = {}
    if precision == "int8":
        quantize = getattr(moe_fast, "quantize", None)
        if quantize is None:
            absent[OURS] = "this version has no moe_fast.quantize"
        else:
            found[OURS] = in_torch(ours(quantize(mixture(exports.model), "int8")))
        found[OURS_BFLOAT16] = in_torch(ours(mixture(exports.model).bfloat16()))
    else:
        dtype = getattr(torch, precision)
        found[OURS] = in_torch(ours(mixture(exports.model).to(dtype)))
        found[DENSE] = in_torch(dense(copy.deepcopy(exports.model).to(dtype)))
    for form in FORMS[precision]:
        reason = form.missing()
        if reason:
            absent[form.who] = reason
        else:
            load = cache(partial(form.load, exports, threads))
            found[form.who] = Candidate(partial(in_runtime, exports, load), STREAMS)
    return found, absent


def mixture(model: Any) -> Any:
    """Upcycle the dense model to equal experts with enforced routing."""
    moe = moe_fast.upcycle(model, num_experts=EXPERTS, routing="enforced", domains=DOMAINS)
    return moe.eval()


def ours(model: Any) -> Callable[[Sequence[str], int], Tensor]:
    """Encode texts, so many per batch, with their domains in turn."""

    def encode(texts: Sequence[str], batch_size: int) -> Tensor:
        from moe_fast.encoding.lengths import counted_truncation

        domains = [DOMAINS[i % EXPERTS] for i in range(len(texts))]
        options = dict(batch_size=batch_size, convert_to_tensor=True, truncate=True)
        with counted_truncation():  # else every call warns how many texts were cut
            vectors: Tensor = model.encode(list(texts), domain=domains, **options)
        return vectors.float()

    return encode


def dense(model: Any) -> Callable[[Sequence[str], int], Tensor]:
    """Encode texts, so many per batch, with the dense model in PyTorch."""

    def encode(texts: Sequence[str], batch_size: int) -> Tensor:
        vectors: Tensor = model.encode(list(texts), batch_size=batch_size, convert_to_tensor=True)
        return vectors.float()

    return encode


def in_torch(encode: Callable[[Sequence[str], int], Tensor]) -> Candidate:
    """Let PyTorch compute one batch at a time, or several in Python threads that share ours."""

    def load(batch_size: int, streams: int) -> Encode:
        def alone(texts: Sequence[str]) -> Tensor:
            return encode(texts, batch_size)

        return alone if streams == 1 else partial(in_threads, alone, streams)

    return Candidate(load, STREAMS)


def in_threads(encode: Encode, streams: int, texts: Sequence[str]) -> Tensor:
    """Encode in so many Python threads; each has an equal share of long and short texts."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    shares = [order[number::streams] for number in range(streams)]
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            streams, initializer=torch.set_num_threads, initargs=(max(1, threads // streams),)
        ) as pool:
            parts = list(pool.map(lambda share: encode([texts[i] for i in share]), shares))
    finally:
        torch.set_num_threads(threads)  # also for threads that begin later
    vectors = torch.cat(parts)
    places = torch.tensor([i for share in shares for i in share])
    return torch.empty_like(vectors).index_copy_(0, places, vectors)


def in_runtime(
    exports: Exports, load: Callable[[int], Embed], batch_size: int, streams: int
) -> Encode:
    """Encode with the dense model in another runtime."""
    return encoder(exports, load(streams), batch_size)


# --- measurement ---------------------------------------------------------------------------------


@dataclass
class Progress:
    """What has been measured so far; it is written to a file after every piece.

    Attributes:
        key: what the figures depend on; with another key they are measured anew.
        settings: the best [texts per batch, batches at a time] by candidate.
        cosines: the least cosine to float32 so far, by candidate.
        rounds: by round and candidate, the seconds of the pieces that are done.
        shares: :func:`~bench.machine.processor_share` after each piece.
    """

    key: list[Any]
    settings: dict[str, list[int]] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, list[float]]] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, key: list[Any]) -> Progress:
        """Read what was measured with the same ``key``; nothing if there is no such file."""
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return cls(**values) if values.get("key") == key else cls(key)

    def next_piece(self, names: Sequence[str], rounds: int) -> tuple[int, int] | None:
        """Return (round, piece) to measure next; None if all are done."""
        if not self.rounds or len(self.rounds[-1][names[0]]) == PIECES:
            if len(self.rounds) == rounds:
                return None
            self.rounds.append({name: [] for name in names})
        return len(self.rounds) - 1, len(self.rounds[-1][names[0]])


def pieces_of(texts: Sequence[str]) -> list[list[int]]:
    """Sort texts by length, as encoders do; deal blocks of them to pieces (lists of indices)."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    blocks = [order[start : start + BLOCK] for start in range(0, len(order), BLOCK)]
    return [[i for block in blocks[piece::PIECES] for i in block] for piece in range(PIECES)]


def best_settings(candidate: Candidate, texts: Sequence[str]) -> list[int]:
    """Return the fastest [texts per batch, batches at a time] on ``texts``; each has two tries.

    All combinations are tried: the best number of texts per batch is another one where two batches
    are computed at a time.
    """
    seconds = {
        (batch_size, streams): min(timed(encode, texts)[0] for _ in range(2))
        for streams in candidate.streams
        for batch_size in BATCHES
        for encode in [candidate.load(batch_size, streams)]
    }
    return list(min(seconds.items(), key=lambda item: item[1])[0])


def timed(encode: Encode, texts: Sequence[str]) -> tuple[float, Tensor]:
    """Return the seconds that the texts take, and their vectors."""
    start = time.perf_counter()
    vectors = encode(texts)
    return time.perf_counter() - start, vectors


def measure_piece(
    encoders: Mapping[str, Encode], texts: Sequence[str], shift: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Let the candidates embed a piece in turn, beginning with another one each time.

    Returns:
        their seconds and their vectors.
    """
    names = list(encoders)
    seconds, vectors = {}, {}
    for name in names[shift % len(names) :] + names[: shift % len(names)]:
        seconds[name], vectors[name] = timed(encoders[name], texts)
    return seconds, vectors


def vectors_folder(state: Path) -> Path:
    """Where the vectors of the last round are kept, to be scored when all are there."""
    return state.with_suffix(".vectors")


def keep_vectors(folder: Path, name: str, piece: int, vectors: Tensor) -> None:
    """Keep a candidate's vectors of a piece."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}, {piece}.npy", vectors.numpy())


def read_vectors(folder: Path, name: str, texts: Sequence[str]) -> Tensor:
    """Return a candidate's vectors in the order of the texts."""
    parts = [torch.from_numpy(np.load(folder / f"{name}, {p}.npy")) for p in range(PIECES)]
    order = torch.tensor([i for piece in pieces_of(texts) for i in piece])
    vectors = torch.cat(parts)
    return torch.empty_like(vectors).index_copy_(0, order, vectors)


# --- the run -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as many pieces as there is time for; write the rows when all rounds are done."""
    arguments = parse(argv)
    deadline = time.monotonic() + arguments.seconds
    if arguments.data:
        os.environ[DATA] = str(arguments.data.resolve(strict=True))
    torch.set_num_threads(arguments.threads)
    pairs = read_pairs(arguments.texts + CALIBRATION)
    pairs, calibration = pairs[: arguments.texts], pairs[arguments.texts :]
    texts = [answer for _, answer in pairs]
    model = pretrained()
    model.max_seq_length = min(MAX_TOKENS, model.max_seq_length)
    exports = Exports(model, [answer for _, answer in calibration], LOCAL / "runtimes")
    exact = reference(exports, texts)
    found, absent = candidates(arguments.precision, exports)
    if arguments.prepare:
        for candidate in found.values():
            candidate.load(BATCHES[0], 1)
        print(f"the models of {', '.join(found)} are in {exports.folder}")
        return 0
    state = LOCAL / f"embedding_peers-{arguments.precision}.json"
    backends = {op: moe_fast.available_backends(op) for op in ("plan", "expert_mlp")}
    settings = environment(backends=backends, products=native.cpu_capability)
    digest = hashlib.sha256(repr(pairs).encode()).hexdigest()
    key = [settings[name] for name in ("cpu", "threads", "versions", "backends", "products")]
    key += [digest, list(found)]
    progress = Progress.read(state, json.loads(json.dumps(key)))
    run(progress, state, found, texts, exact, arguments.rounds, deadline)
    done = sum(len(measured) for r in progress.rounds for measured in list(r.values())[:1])
    print(f"{done} of {arguments.rounds * PIECES} pieces are measured")
    settings["versions"] |= versions()
    if done == arguments.rounds * PIECES:
        scores = scores_of(progress, state, found, pairs, exports, exact)
        rows = rows_of(progress, arguments.precision, exports, texts, absent, scores)
        append(arguments.json, Record(settings, noisy=noise_of(progress), rows=rows))
        for row in rows:
            print(
                f"{row.who}: {row.ratio.shown(2) if row.ratio else row.reason}", row.figures or ""
            )
    return 0


def scores_of(
    progress: Progress,
    state: Path,
    found: Mapping[str, Candidate],
    pairs: Sequence[tuple[str, str]],
    exports: Exports,
    exact: Tensor,
) -> dict[str, dict[str, float]]:
    """Score each candidate's vectors of the last round, in a search by the texts' questions."""
    questions, texts = (list(column) for column in zip(*pairs, strict=True))
    encoders = {name: c.load(*progress.settings[name]) for name, c in found.items()}
    folder = vectors_folder(state)
    vectors = {
        name: (encode(questions), read_vectors(folder, name, texts))
        for name, encode in encoders.items()
    }
    return quality(pairs, (dense(exports.model)(questions, BATCHES[-1]), exact), vectors)


def noise_of(progress: Progress) -> list[str]:
    """Say so if other programs took time while the pieces ran."""
    share = float(np.mean(progress.shares))
    return [f"a busy thread got {share:.0%} of a processor"] if share < 0.95 else []


def run(
    progress: Progress,
    state: Path,
    found: Mapping[str, Candidate],
    texts: Sequence[str],
    exact: Tensor,
    rounds: int,
    deadline: float,
) -> None:
    """Measure piece by piece until all rounds are done, or the next would pass ``deadline``.

    Raises:
        WrongResult: a candidate's vectors are not those of the dense model.
    """
    precision = state.stem.rpartition("-")[2]
    pieces = pieces_of(texts)
    for name, candidate in found.items():
        if name not in progress.settings:
            progress.settings[name] = best_settings(candidate, [texts[i] for i in pieces[0][::2]])
            write_json(state, asdict(progress))
            print(f"{name}: texts per batch, batches at a time {progress.settings[name]}")
            if time.monotonic() > deadline:
                return
    encoders = {name: found[name].load(*progress.settings[name]) for name in found}
    for encode in encoders.values():
        encode(texts[:BLOCK])
    longest = 0.0
    while (place := progress.next_piece(list(found), rounds)) is not None:
        start = time.monotonic()
        if start + longest > deadline:
            return
        number, piece = place
        here = pieces[piece]
        seconds, vectors = measure_piece(
            encoders, [texts[i] for i in here], number * PIECES + piece
        )
        for name in encoders:
            cosine = torch.cosine_similarity(vectors[name], exact[here]).min().item()
            keep_vectors(vectors_folder(state), name, piece, vectors[name])
            if not cosine >= LEAST_COSINE[precision]:
                raise WrongResult(f"{name}: least cosine {cosine:.5f} to float32.")
            progress.cosines[name] = min(cosine, progress.cosines.get(name, 1.0))
            progress.rounds[number][name].append(seconds[name])
        progress.shares.append(processor_share())
        write_json(state, asdict(progress))
        longest = max(longest, time.monotonic() - start)


def reference(exports: Exports, texts: Sequence[str]) -> Tensor:
    """Return the vectors of the dense model in float32, from a file if they are there."""
    name = f"vectors-{hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}.npy"
    encode = dense(exports.model)

    def make(path: Path) -> None:
        np.save(path, encode(texts, BATCHES[-1]).numpy())

    return torch.from_numpy(np.load(exports.file(name, make)))


def tokens_of(exports: Exports, texts: Sequence[str]) -> int:
    """Count the tokens of the cut texts."""
    limit = exports.model.max_seq_length
    ids = exports.model.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
    return sum(map(len, ids))


def rows_of(
    progress: Progress,
    precision: str,
    exports: Exports,
    texts: Sequence[str],
    absent: Mapping[str, str],
    scores: Mapping[str, Mapping[str, float]],
) -> list[Row]:
    """Make the rows of all rounds; a round's seconds are the sum of its pieces'."""
    samples = {
        name: [sum(measured[name]) for measured in progress.rounds] for name in progress.settings
    }
    baseline = OURS if OURS in samples else OURS_BFLOAT16
    tokens = tokens_of(exports, texts)
    shape = {"texts": len(texts), "tokens": tokens, "E": EXPERTS}
    base = Row("embedding beside other runtimes", shape, precision, OURS, baseline)
    rows = []
    for result in summarize(samples, baseline):
        batch, streams = progress.settings[result.name]
        figures = {
            "tokens per second": round(tokens / result.seconds.median),
            "least cosine to float32": progress.cosines[result.name],
            "texts per batch": batch,
            "batches at a time": streams,
            **scores[result.name],
        }
        rows.append(
            replace(base, who=result.name, ratio=result.ratio, seconds=result.seconds,
                    figures=figures)
        )  # fmt: skip
    return [*rows, *(replace(base, who=name, reason=reason) for name, reason in absent.items())]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the settings of a run."""
    parser = argparse.ArgumentParser(
        prog="bench.embedding_peers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("precision", choices=list(FORMS))
    parser.add_argument("--data", type=Path, help="JSON lines a, b: texts; default: random ones")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of this run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prepare", action="store_true", help="only make the models' files")
    parser.add_argument("--json", type=Path, default=LOCAL / "embedding_peers.json")
    arguments = parser.parse_args(argv)
    least = {"texts": PIECES * BLOCK, "rounds": 1, "threads": 1}
    for name, bound in least.items():
        if getattr(arguments, name) < bound:
            parser.error(f"--{name} must be at least {bound}; got {getattr(arguments, name)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
