"""A sample of what ``make test-hostile`` tries; no sample is the measure of clear errors."""

import pytest

pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
pytest.importorskip("faiss", reason="needs the extra moe-fast[search]")

from tests.hostile.__main__ import is_good, main, summary
from tests.hostile.cases import ACCEPTED, CLEAR, SIGNALLED, UNCLEAR, Result


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
