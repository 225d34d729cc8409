"""Long texts, padded and packed: the table, on little work."""

import pytest

from bench.long_context import ENCODERS, WHO, Job, main, times

WORDS = ["--lengths", "24,9", "--layers", "1", "--width", "48"]


@pytest.mark.parametrize("name", ENCODERS)
def test_both_compute_the_same_and_are_timed(name):
    results = times(Job(name, (24, 9), layers=1, width=48, dtype="float32"), rounds=2)
    assert list(results) == list(WHO)


def test_memory_is_that_of_one_forward_pass(capsys):
    assert main(["modernbert", *WORDS, "--peak", "packed"]) == 0
    assert 0 <= int(capsys.readouterr().out) < 1 << 30


@pytest.mark.slow  # loads the libraries in two more processes
def test_the_table(capsys):
    assert main(["modernbert", *WORDS, "--rounds", "2"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| modernbert | ") and row.count("|") == 7


def test_unknown_encoders_are_named(capsys):
    with pytest.raises(SystemExit):
        main(["bert"])
    assert "encoders must be of modernbert, " in capsys.readouterr().err
