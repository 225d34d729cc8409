"""bench.report: a page and pictures from records, complete and without files that are missing."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

pytest.importorskip("matplotlib", reason="needs the extra moe-fast[eval]")

from bench.cases import OURS
from bench.harness import Summary, write_json
from bench.machine import Machine
from bench.peak_memory import MLP, SUFFIX
from bench.record import Record, Row, Work
from bench.report import best_of_others, main, table

ENVIRONMENT = {"cpu": "a processor", "threads": 2, "versions": {"torch": "2.13", "triton": None}}
SECONDS = Summary(1.0, 1.0, 1.0, 9)
OPERATION = MLP + SUFFIX
PNG = b"\x89PNG\r\n\x1a\n"


def row(who, ratio, tokens=8, sweep=None, operation="expert MLP", **more):
    r = Summary(ratio, 0.9 * ratio, 1.1 * ratio, 9)
    seconds = Summary(1e-3 * ratio * tokens, 1e-3, 1e-2, 9)
    shape = {"T": tokens, "D": 4}
    work = Work(1e6 * tokens, 1e5)
    return Row(operation, shape, "float32", who, OURS, r, seconds, work, 1e-4, 0.5, sweep, **more)


def whole_record() -> Record:
    rows = [row(who, r, t) for t in (8, 16) for who, r in ((OURS, 1), ("eager", 2), ("dense", 0.8))]
    rows += [row(who, r, t, "T") for t in (8, 16, 32) for who, r in ((OURS, 1), ("eager", 2))]
    rows += [
        Row(OPERATION, {"T": t}, "float32", who, OURS, sweep="T", peak_bytes=t << 20)
        for t in (8, 16)
        for who in (OURS, "eager")
    ]
    rows.append(Row("expert MLP", {"T": 8, "D": 4}, "float32", "Liger", OURS, reason="needs a GPU"))
    machine = Machine(2e10, 3e10, {"float32": 1e11, "bfloat16": 2e11})
    return Record(ENVIRONMENT, machine, 2.0, ["load average 9.0 before the run"], rows)


def test_a_page_of_everything(tmp_path):
    results, page = tmp_path / "results", tmp_path / "docs" / "benchmarks.md"
    write_json(results / "cpu.json", asdict(whole_record()))
    whole = [Row("import", {}, "", who, "dense", SECONDS, SECONDS) for who in ("dense", OURS)]
    write_json(results / "other.json", asdict(Record(ENVIRONMENT, rows=whole)))
    write_json(results / "empty.json", asdict(Record(ENVIRONMENT)))  # no comparison
    assert main(["--results", str(results), "--output", str(page)]) == 0
    text = page.read_text()
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(linked) == len(set(linked)) == 6
    for name in linked:
        assert (page.parent / name).read_bytes().startswith(PNG)
    assert {path.name for path in (page.parent / "images").iterdir()} == {
        name.partition("/")[2] for name in linked
    }
    assert "A noisy run" in text and "Liger: needs a GPU" in text
    assert "| T=8 D=4 | eager | 2.00 [1.80, 2.20] | 16 | 50% |" in text
    assert "| expert MLP | T | 8 .. 32 | moe_fast | 1.00 ± 0.00 |" in text
    assert f"| {OPERATION} | T=8 | eager | 8 |" in text
    for words in ("expert_mlp", "growth", "peak_memory"):
        assert f"Repeat: `python -m bench {words}`" in text
    assert "Repeat: `python -m bench import_time`" in text
    assert "100 GFLOP/s in float32" in text


def test_the_best_of_the_others_is_never_dense_nor_ours():
    best = best_of_others(whole_record().rows)
    assert best == {"expert MLP, float32": (pytest.approx(2), 2, 2)}


def test_who_never_ran_is_named_once():
    rows = [Row("op", {"T": t}, "float32", "Liger", OURS, reason="no GPU") for t in (1, 2)]
    rows.append(Row("op", {"T": 2}, "float32", "batched_mm", OURS, reason="copies too much"))
    text = table({"a processor": rows})
    assert text.count("Liger: no GPU") == 1
    assert "- Liger: no GPU\n" in text and "batched_mm: copies too much (T=2)" in text


def test_processors_stand_side_by_side(tmp_path):
    """Each operation has one table; what only one processor has leaves the other's cells empty."""
    results, page = tmp_path / "results", tmp_path / "docs" / "benchmarks.md"
    figures = {"tokens per second": 12345, "least cosine": 0.99951}
    for name, ratio in (("a", 2.0), ("b", 3.0)):
        rows = [row(OURS, 1), row("eager", ratio), row("eager", 1.5, 16 if name == "a" else 32)]
        rows.append(Row("expert MLP", {"T": 8, "D": 4}, "float32", "X", OURS, reason=f"on {name}"))
        if name == "b":
            rows.append(
                row("peer", 4, operation="embedding beside other runtimes", figures=figures)
            )
        record = Record(ENVIRONMENT | {"cpu": f"processor {name}"}, rows=rows)
        write_json(results / f"cpu-{name}.json", asdict(record))
    assert main(["--results", str(results), "--output", str(page)]) == 0
    text = page.read_text()
    assert text.count("## Several processors") == text.count("### expert MLP, float32") == 1
    assert "**processor a**" in text and "**processor b**" in text
    columns = [
        f"{head}, processor {name}"
        for name in "ab"
        for head in (f"time over {OURS}'s", "ms", "share of the floor")
    ]
    assert f"| shape | candidate | {' | '.join(columns)} |" in text
    first, second = "2.00 [1.80, 2.20] | 16 | 50%", "3.00 [2.70, 3.30] | 24 | 50%"
    assert f"| T=8 D=4 | eager | {first} | {second} |" in text
    assert "| T=16 D=4 | eager | 1.50 [1.35, 1.65] | 24 | 50% |  |  |  |" in text
    assert "- processor a: X: on a" in text and "- processor b: X: on b" in text
    assert "Repeat: `python -m bench.embedding_peers float32`" in text and "On processor b:" in text
    assert "| tokens per second | least cosine |" in text and "| 12,345 | 0.99951 |" in text


@pytest.mark.parametrize("content", [None, "{}"])
def test_no_records_is_a_usage_error(tmp_path, capsys, content):
    if content:
        (tmp_path / "bad.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["--results", str(tmp_path), "--output", str(tmp_path / "page.md")])
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
