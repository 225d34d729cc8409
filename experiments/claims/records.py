"""The record of a cell: a JSON file that is written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.claims.arms import ARMS, Trained
from experiments.claims.data import Data
from experiments.claims.settings import Cell, Settings
from moe_fast.demo.comparison import machine
from moe_fast.files import write_text

_OF_THE_DEMO = ("train_pairs", "usage_texts")  # settings that no cell reads


def compact(values: NDArray[np.float32]) -> str:
    """Numbers as text: float32, little-endian, compressed by zlib, in base64."""
    return base64.b64encode(zlib.compress(values.astype("<f4").tobytes(), 9)).decode()


def numbers(text: str) -> NDArray[np.float32]:
    """The inverse of :func:`compact`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f4")


def questions_of(data: Data, predicted: list[str], accuracy: dict[str, float]) -> dict[str, Any]:
    """What the records of a data set share: each question's domain, prediction and group."""
    assert data.test.domains is not None
    domains = data.domains
    groups = {name: i for i, name in enumerate(dict.fromkeys(data.groups.values()))}
    place = {name: i for i, name in enumerate(domains)}
    return {
        "sha256": fingerprint(data),
        "training pairs": len(data.train),
        "documents": len(data.test.corpus),
        "questions": len(data.test.queries),
        "domains": domains,
        "accuracy of the predictor": {key: round(value, 4) for key, value in accuracy.items()},
        "domain": compact(np.array([place[n] for n in data.test.domains.values()], np.float32)),
        "predicted": compact(np.array([place[n] for n in predicted], np.float32)),
        "group": compact(np.array([groups[data.groups[q]] for q in data.test.queries], np.float32)),
    }


def fingerprint(data: Data) -> str:
    """A hash of the training pairs and the held-out texts, in their order."""
    parts = (
        list(data.train["a"]),
        list(data.train["b"]),
        list(data.train["domain"]),
        data.test.queries,
        data.test.corpus,
        data.test.qrels,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def record_of(
    cell: Cell,
    trained: Trained,
    scores: dict[str, NDArray[np.float32]],
    data: Data,
    settings: Settings,
    measuring: float,
) -> dict[str, Any]:
    """Everything about a cell, as JSON can hold it."""
    return {
        **cell._asdict(),
        "title": ARMS[cell.arm][0],
        "command": f"python -m experiments.claims --model {cell.model} --data {cell.data} "
        f"--arm {cell.arm} --seed {cell.seed}",
        "nDCG@10": {place: round(float(values.mean()), 4) for place, values in scores.items()},
        "steps": trained.steps,
        "training seconds": round(trained.seconds, 1),
        "measuring seconds": round(measuring, 1),
        "machine was": os.environ.get("CLAIMS_MACHINE", "quiet"),
        "processor": processor(),
        "machine": machine(),
        "settings": {k: v for k, v in asdict(settings).items() if k not in _OF_THE_DEMO},
        "data sha256": fingerprint(data),
        "losses": [round(loss, 4) for loss in trained.losses],
        "per question": {place: compact(values) for place, values in scores.items()},
    }


def processor() -> str:
    """The processor's name and what it has for bfloat16, as Linux says it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = " ".join(line for line in lines if line.startswith("flags"))
    units = ", ".join(n for n in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if n in flags)
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} cores; {units})"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a record in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read a record."""
    return json.loads(path.read_text(encoding="utf-8"))
