"""The demo's texts: what counts as public, how docstrings are cut, that splits share nothing."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("datasets")

from moe_fast.demo.docstrings import (
    DOMAINS,
    DocstringPair,
    documented,
    make_pair,
    read_pairs,
    source_files,
    split_pairs,
)

SOURCE = '''
def solve(a):
    """Solve it."""
def _hidden(a):
    """Not public."""
def old(a):
    """Do it. .. deprecated:: 1.2"""
def silent(a): pass
class Solver:
    """Solves all."""
    def run(self):
        """Run the solver."""
    def _step(self):
        """Not public."""
class _Private:
    """Nor its methods."""
    def run(self):
        """Run."""
'''
BODY = "It takes a matrix and a vector, and gives what solves the equation of these two, if any."


def test_only_what_is_public_counts():
    found = dict(documented(ast.parse(SOURCE)))
    assert found == {
        "solve": "Solve it.",
        "Solver": "Solves all.",
        "Solver.run": "Run the solver.",
    }


def test_a_docstring_is_cut_and_its_name_hidden():
    text = (
        f"Solve, i.e. invert, with :func:`numpy.linalg.solve`.\n\n{BODY} SOLVE it, solvers!\n-----"
    )
    pair = make_pair("solve", "f.py", "numpy", text)
    assert pair.query == "something, i.e. invert, with something ."
    assert pair.document == f"{BODY} something it, solvers!"
    method = make_pair("Solver.run", "f.py", "numpy", f"Let Solver.run run a solver.\n\n{BODY}")
    assert method.query == "Let something something a something."


@pytest.mark.parametrize(
    "text", ["Too short.\n\n" + BODY, "Solve the linear equation.\n\nNo more.", "word " * 50]
)
def test_too_short_and_too_long_texts_are_left_out(text):
    assert make_pair("f", "f.py", "numpy", text) is None


@pytest.mark.parametrize("domain", ["numpy", "stdlib"])
def test_every_domain_has_texts_that_differ(domain):
    pairs = read_pairs(domain)
    assert len(pairs) > 150 and {pair.domain for pair in pairs} == {domain}
    assert len({pair.query for pair in pairs}) == len({pair.document for pair in pairs})
    for pair in pairs:
        assert 3 <= len(pair.query.split()) <= 40 and 12 <= len(pair.document.split()) <= 160


def test_tests_and_private_modules_are_not_read():
    for path in source_files("numpy"):
        parts = path.with_suffix("").parts
        assert not {"tests", "testing", "conftest", "_core"} & set(parts), path


def made_up(per_domain: int) -> dict[str, list[DocstringPair]]:
    return {
        domain: [
            DocstringPair(f"f{i}", f"{domain}/{i // 3}.py", domain, f"query {i}", f"{domain} {i}")
            for i in range(per_domain)
        ]
        for domain in DOMAINS
    }


def test_no_file_is_on_both_sides():
    train, test = split_pairs(made_up(30), 50, 25, seed=1)
    assert (len(train), len(test.corpus), len(test.queries)) == (50, 25, 25)
    assert all(train["domain"].count(domain) == 10 for domain in DOMAINS)
    files = {text.split()[0] + str(int(text.split()[1]) // 3) for text in train["document"]}
    held_out = {text.split()[0] + str(int(text.split()[1]) // 3) for text in test.corpus.values()}
    assert not files & held_out
    for query, (document,) in ((q, tuple(d)) for q, d in test.qrels.items()):
        assert test.domains[query] == test.corpus_domains[document]
    again, _ = split_pairs(made_up(30), 50, 25, seed=1)
    assert again["document"] == train["document"]
    assert split_pairs(made_up(30), 50, 25, seed=2)[0]["document"] != train["document"]


@pytest.mark.parametrize(("train", "held_out"), [(5, 4), (4, 5), (200, 25), (25, 200)])
def test_too_few_pairs_are_an_error(train, held_out):
    with pytest.raises(ValueError, match="'numpy' must give"):
        split_pairs(made_up(30), train, held_out, seed=0)


def test_the_texts_do_not_depend_on_the_hash_seed():
    code = "from moe_fast.demo.docstrings import *; print(*read_pairs('numpy'))"
    outputs = set()
    for seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        )
        outputs.add(hashlib.sha256(json.dumps(done.stdout.decode()).encode()).hexdigest())
    assert len(outputs) == 1
