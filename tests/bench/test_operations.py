"""Every operation file, at tiny shapes: candidates run and agree, checks catch what is wrong."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from bench import (
    cached_step,
    expert_mlp,
    growth,
    info_nce,
    maxsim,
    moe_mlp,
    peak_memory,
    peers,
    plan,
    privacy_filter,
    route,
    rows,
    training_step,
)
from bench.__main__ import JOBS, TIMED, main
from bench.cases import OURS, SIZES, WrongResult, measure
from bench.harness import ROOT
from bench.peak_memory import LOSS, MLP
from bench.problem import EXPERTS, bert
from bench.record import read_record

FILES = {
    "route": route,
    "plan": plan,
    "rows": rows,
    "expert_mlp": expert_mlp,
    "privacy_filter": privacy_filter,
    "moe_mlp": moe_mlp,
    "info_nce": info_nce,
    "maxsim": maxsim,
    "training_step": training_step,
    "cached_step": cached_step,
}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """torch.compile takes seconds per case and is not what is tested here."""
    monkeypatch.setattr(torch, "compile", lambda f=None, **_: f if f else lambda g: g)


@pytest.mark.parametrize("name", FILES)
def test_every_candidate_computes_the_same(name):
    for case in FILES[name].cases("tiny"):
        found = measure(case, seconds=0, rounds=1, min_sample_seconds=0)
        assert found[0].who == case.baseline and len(found) > 1
        assert not [r for r in found if r.reason and r.reason.startswith("fails")], found
        assert case.work is None or (case.work.moved > 0 and case.work.flop >= 0)


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_result_of_ours_is_caught(name):
    case = next(iter(FILES[name].cases("tiny")))
    torch.manual_seed(0)
    candidates = case.prepare()
    outputs = {who: run() for who, run in candidates.runs.items()}
    outputs = copy.deepcopy(outputs)
    ours = OURS if OURS in outputs else "CachedLoss"
    first = outputs[ours][-1]
    first[-1] = first[-1] + 1  # in place: one element or one row of the last output
    with pytest.raises(WrongResult, match=ours):
        candidates.check(outputs)


@pytest.mark.parametrize("name", FILES)
def test_larger_sizes_hold_more_cases(name):
    counts = [len(list(FILES[name].cases(size))) for size in SIZES]
    assert counts[0] >= 1 and counts[-1] == max(counts)


def test_work_of_the_experts():
    shape = bert(10, 4, 2, torch.float32)
    work = expert_mlp.work(shape, backward=False)
    assert work.flop == 2 * 20 * (4 * 16 + 16 * 4)
    assert work.moved == 4 * (2 * 10 * 4 + 8 * 2 * 4 * 16)
    assert expert_mlp.work(shape, backward=True).flop == 3 * work.flop
    few = bert(1, 4, 2, torch.bfloat16)
    assert expert_mlp.work(few, False).moved == 2 * (2 * 4 + 2 * 2 * 4 * 16)  # two experts hit


def test_gpu_libraries_say_why_not():
    libraries = {"ScatterMoE", "MegaBlocks", "SonicMoE", "Liger"}
    assert set(peers.gpu_only()) == libraries
    assert set(peers.gpu_only(attention=True)) == libraries | {"xformers"}
    assert all("needs a CUDA GPU" in reason for reason in peers.gpu_only().values())


def test_batched_mm_is_absent_where_it_copies_too_much(monkeypatch):
    monkeypatch.setattr(expert_mlp, "LARGEST_COPY", 0)
    shape = bert(8, 8, 1, torch.float32, bias=False)
    candidates = expert_mlp.candidates(shape, backward=False)
    assert "batched_mm" not in candidates.runs
    assert "copies each row's weights" in candidates.absent["batched_mm"]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_a_known_exponent_is_found(power):
    exponent, error = growth.fit([(n, 3.0 * n**power) for n in (1, 2, 4, 8)])
    assert exponent == pytest.approx(power, abs=1e-12)
    assert error == pytest.approx(0, abs=1e-7)


def test_the_error_of_an_exponent_is_the_regression_s():
    stats = pytest.importorskip("scipy.stats")
    points = [(1, 1.0), (2, 2.5), (4, 3.0), (8, 9.0)]
    x, y = torch.tensor(points).log().T.tolist()
    expected = stats.linregress(x, y)
    assert growth.fit(points) == pytest.approx((expected.slope, expected.stderr), rel=1e-5)


def test_curves_of_a_sweep():
    def seconds(row):
        return row.seconds and row.seconds.median

    rows = []
    for case in growth.cases("tiny"):
        if case.operation == "plan":
            rows += measure(case, seconds=0, rounds=1, min_sample_seconds=0)
    curves = growth.curves_of(rows, seconds)
    assert {(c.operation, c.letter) for c in curves} == {("plan", "T")}
    assert all(c.sizes == sorted(c.sizes) and len(c.sizes) == len(c.values) == 3 for c in curves)
    assert growth.curves_of(rows[:1], seconds) == []


def test_sweeps_vary_one_size():
    for letter in "TEKD":
        cases = [
            c for c in growth.cases("default") if c.sweep == letter and "expert" in c.operation
        ]
        others = {tuple(v for k, v in c.shape.items() if k not in (letter, "H")) for c in cases}
        assert len(others) == 1 and len(cases) >= 4
    assert any(c.sweep == "B" for c in growth.cases("default"))


def test_peak_memory_of_a_known_allocation():
    if not peak_memory.Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    size = 64 << 20
    code = (
        "import torch; from bench.peak_memory import peak_bytes;"
        f"print(peak_bytes(lambda: torch.ones({size}, dtype=torch.uint8)))"
    )  # in a fresh process, as the benchmark does: in an old one freed memory may be used again
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = int(done.stdout)
    assert size <= found + (1 << 20) and found < 1.2 * size


@pytest.mark.slow
def test_memory_in_a_fresh_process():
    rows = [peak_memory.row(MLP, who, 64) for who in peak_memory.CANDIDATES[MLP]]
    weights = 2 * EXPERTS * 4 * peak_memory.DIM**2 * 4
    for row in rows:
        if row.reason is None:  # the gradients of the weights are the least that it takes
            least = weights / EXPERTS if row.who == "dense" else weights
            assert row.peak_bytes > 0.95 * least, row
    with pytest.raises(RuntimeError, match="the measuring process for nobody failed"):
        peak_memory.in_fresh_process(MLP, "nobody", 1)


@pytest.mark.slow
def test_memory_of_the_loss():
    """The dense loss holds at least three B x B matrices, the tiled one less than one."""
    matrix = 4096**2 * 4
    names = peak_memory.CANDIDATES[LOSS]
    ours, theirs, cached = (peak_memory.in_fresh_process(LOSS, who, 4096) for who in names)
    assert ours < matrix and cached < 3 * matrix < theirs


def test_a_run_writes_one_file(tmp_path, capsys):
    path = tmp_path / "run.json"
    words = ["plan", "route", "--size", "tiny", "--seconds", "0", "--processes", "1"]
    assert main([*words, "--json", str(path)]) == 0
    record = read_record(path)
    assert {row.operation for row in record.rows} == {"plan", "route, forward"}
    assert set(record.machine.matrix_rate) == {"float32", "bfloat16"}
    assert all(row.floor_seconds for row in record.rows)
    assert f"{path}: {len(record.rows)} rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["nothing"], ["--size", "huge"], ["--threads", "0"], ["--processes", "0"]]
)
def test_bad_arguments_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_every_operation_has_a_file():
    for name in (*TIMED, *JOBS):
        assert name in FILES or (ROOT / "bench" / f"{name}.py").is_file()


def test_dense_has_a_floor_of_its_own():
    """One expert's weights; the case's floor counts those of all experts hit."""
    case = next(iter(expert_mlp.cases("tiny")))
    rows = measure(case, seconds=0, rounds=1, min_sample_seconds=0)
    dense, ours = (next(r for r in rows if r.who == who) for who in ("dense", OURS))
    assert dense.work.flop == ours.work.flop and dense.work.moved < ours.work.moved
