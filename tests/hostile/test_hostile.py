"""A sample of what ``make test-hostile`` tries; no sample is the measure of clear errors."""

import json

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")

from tests.hostile.__main__ import is_good, main, summary
from tests.hostile.cases import ACCEPTED, CLEAR, SIGNALLED, UNCLEAR, Result
from tests.hostile.kills import content, digest


@pytest.mark.slow
def test_a_sample_of_bad_inputs_ends_in_clear_errors(capfd):
    assert main(["--sample", "40", "--kills", "0", "--processes", "1"]) == 0, capfd.readouterr().out


def result(outcome, control=False):
    return Result("group", "name", control, outcome, "said")


def test_what_is_good():
    clear = [result(CLEAR)] * 98
    assert is_good([*clear, result(UNCLEAR), result(ACCEPTED), result(ACCEPTED, control=True)])
    assert not is_good([*clear, *[result(UNCLEAR)] * 3])
    assert not is_good([*clear, result(SIGNALLED)])
    assert not is_good([*clear, result(CLEAR, control=True)])
    assert "98 of 99 bad inputs (99.0%)" in summary([*clear, result(UNCLEAR)])


def test_results_are_compared_without_how_long_they_took(tmp_path):
    logs = [
        {"history": [{"loss": loss, "train_runtime": s, "tokens_per_second": s}]}
        for loss, s in ((0.5, 1), (0.5, 2), (0.6, 1))
    ]
    first, later, other = (tmp_path / f"{i}.json" for i in range(3))
    for path, log in zip((first, later, other), logs, strict=True):
        path.write_text(json.dumps(log))
    assert digest(first) == digest(later) != digest(other)


def test_a_result_is_all_that_lies_there(tmp_path):
    """A killed run whose rerun writes no settings is not the same."""
    vectors = tmp_path / "x.npy"
    vectors.write_bytes(b"numbers")
    before = content(vectors)
    (tmp_path / "x.npy.yaml").write_text("a: 1")
    assert content(vectors) == before | {"x.npy.yaml": "it is there"}
