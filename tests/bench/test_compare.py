"""bench.compare: what counts as slower, on records made up here; and a real slowdown (slow)."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from bench import plan
from bench.cases import OURS, Candidates, Case, measure
from bench.compare import compare_records, main
from bench.harness import Summary, write_json
from bench.record import Record, Row

SECONDS = Summary(1.0, 1.0, 1.0, 9)
ENVIRONMENT = {"cpu": "a processor", "commit": "abc"}


def record(**ratios: dict[str, tuple[float, float, float]]) -> Record:
    """By operation: each peer's time over ours, (q1, median, q3)."""
    rows = []
    for operation, peers in ratios.items():
        rows.append(Row(operation, {"T": 4}, "float32", OURS, OURS, SECONDS, SECONDS))
        for peer, (q1, median, q3) in peers.items():
            ratio = Summary(median, q1, q3, 9)
            rows.append(Row(operation, {"T": 4}, "float32", peer, OURS, ratio, SECONDS))
        rows.append(Row(operation, {"T": 4}, "float32", "Liger", OURS, reason="needs a CUDA GPU"))
    return Record(ENVIRONMENT, rows=rows)


def run(tmp_path, old, new, *arguments):
    for name, value in (("old", old), ("new", new)):
        write_json(tmp_path / f"{name}.json", asdict(value))
    return main([str(tmp_path / "old.json"), str(tmp_path / "new.json"), *arguments])


OLD = {"dense": (1.9, 2.0, 2.1), "eager": (3.8, 4.0, 4.2), "grouped_mm": (2.8, 3.0, 3.2)}


@pytest.mark.parametrize(
    ("new", "slower", "agree"),
    [
        (OLD, False, 3),
        # Three times slower: every peer's ratio falls to a third.
        ({p: (a / 3, b / 3, c / 3) for p, (a, b, c) in OLD.items()}, True, 0),
        # Faster is no fault.
        ({p: (a * 3, b * 3, c * 3) for p, (a, b, c) in OLD.items()}, False, 0),
        # One peer became faster: the two others say that ours did not change.
        ({**OLD, "dense": (0.9, 1.0, 1.1)}, False, 2),
        # Within the spread of a noisy run.
        ({p: (b / 3, b / 1.5, 1.01 * b) for p, (a, b, c) in OLD.items()}, False, 3),
        # Beyond the spread, but too little to count.
        ({p: (b / 1.09, b / 1.08, b / 1.075) for p, (a, b, c) in OLD.items()}, False, 0),
        # A tie is no majority.
        ({"dense": (0.9, 1.0, 1.1), "eager": OLD["eager"]}, False, 1),
    ],
)
def test_slower_is_what_most_peers_say(tmp_path, capsys, new, slower, agree):
    assert run(tmp_path, record(mlp=OLD), record(mlp=new)) == int(slower)
    out = capsys.readouterr().out
    assert f"{int(slower)} of 1 cases became slower" in out
    assert f"{agree} of {len(new)} ratios agree" in out
    assert ("SLOWER 3.00 times: mlp, T=4, float32" in out) == slower


def test_the_least_factor_is_a_choice(tmp_path):
    new = {p: (a / 3, b / 3, c / 3) for p, (a, b, c) in OLD.items()}
    assert run(tmp_path, record(mlp=OLD), record(mlp=new), "--least", "3.5") == 0


def test_what_one_run_lacks_is_named(tmp_path, capsys):
    old, new = record(mlp=OLD, plan=OLD), record(mlp=OLD, route=OLD)
    assert run(tmp_path, old, new) == 0
    out = capsys.readouterr().out
    assert "only in the old run: plan, T=4" in out and "only in the new run: route, T=4" in out


def test_records_whose_baseline_is_a_peer():
    def ours_over_dense(ratio: float) -> Record:
        ours = Row("mlp", {}, "", OURS, "dense", Summary.of([ratio] * 3), SECONDS)
        return Record(ENVIRONMENT, rows=[Row("mlp", {}, "", "dense", "dense", SECONDS), ours])

    comparison = compare_records(ours_over_dense(0.5), ours_over_dense(1.5))
    ((change,),) = comparison.changes.values()
    assert change.peer == "dense" and change.factor == 3.0 and change.slower(1.1)


def test_instructions_are_held_against_the_earlier_count(tmp_path):
    def counted(number: int) -> Record:
        return Record(ENVIRONMENT, rows=[Row("plan", {}, "", OURS, OURS, instructions=number)])

    assert run(tmp_path, counted(1000), counted(1050)) == 0
    assert run(tmp_path, counted(1000), counted(1200)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.json", "nothing.json"], "nothing.json"),
        (["old.json", "empty.json"], "no case and peer in common"),
        (["old.json", "old.json", "--least", "0.5"], "--least must be at least 1; got 0.5"),
    ],
)
def test_bad_input_is_a_usage_error(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_json("old.json", asdict(record(mlp=OLD)))
    write_json("empty.json", asdict(Record(ENVIRONMENT)))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_planted_threefold_slowdown_is_caught(tmp_path):
    """Ours does its work three times over; the peers stay as they are. Ratios, not times."""
    honest = plan.case_of(65536, plan.EXPERTS, 2)

    def slowed() -> Candidates:
        candidates = honest.prepare()
        once = candidates.runs[OURS]
        candidates.runs[OURS] = lambda: [once() for _ in range(3)][-1]
        return candidates

    planted = Case(honest.operation, honest.shape, honest.dtype, slowed)
    files = []
    for name, case in (("old", honest), ("same", honest), ("slow", planted)):
        rows = measure(case, seconds=10, rounds=60)
        files.append(tmp_path / f"{name}.json")
        write_json(files[-1], asdict(Record(ENVIRONMENT, rows=rows)))
    old, same, slow = map(str, files)
    assert main([old, slow]) == 1
    assert main([old, same, "--least", "2"]) == 0
