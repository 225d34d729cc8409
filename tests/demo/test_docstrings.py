from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from moe_fast.demo.docstrings import (
    NAME_TOKEN,
    SOURCES,
    STDLIB_MODULES,
    DocstringPair,
    Source,
    drop_duplicates,
    extract_pairs,
    first_sentence,
    hide_name,
    make_pair,
    plain_text,
    split_pairs,
    strip_signature,
)

ROOT = Path(__file__).parents[2]
SMALL = Source(
    "small",
    modules=("difflib", "json", "statistics", "textwrap"),
    owners=frozenset({"difflib", "json", "statistics", "textwrap"}),
)


@pytest.fixture(scope="module")
def small_pairs() -> list[DocstringPair]:
    return extract_pairs([SMALL])


def _pair(
    name: str, query: str, document: str, domain: str = "x", owner: str = ""
) -> DocstringPair:
    return DocstringPair(name, owner or name, domain, query, document)


def _words(seed: str, count: int) -> str:
    """Letters only, different for each seed."""
    digest = hashlib.sha512(seed.encode()).hexdigest() * 4
    letters = digest.translate(str.maketrans("0123456789", "ghijklmnop"))
    return " ".join(letters[5 * i : 5 * i + 5] for i in range(count))


def _many_pairs(counts: dict[str, int]) -> list[DocstringPair]:
    return [
        _pair(
            f"{domain}.C{i // 3}.m{i}", f"q {domain} {i}", f"d {i}", domain, f"{domain}.C{i // 3}"
        )
        for domain, count in counts.items()
        for i in range(count)
    ]


# --- cutting a docstring ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abs(input, *, out=None) -> Tensor\n\nComputes it.", "Computes it."),
        ("add(x1, x2, /, where=True[, sig])\n\nAdd them.", "Add them."),
        ("f(a, b=(1, 2))\nf(a)\n\nOne or two.", "One or two."),
        ("D.get(k) -> D[k]. Looks up a key.", "Looks up a key."),
        ("f(a, b", ""),
        ("Plain (with parentheses) text.", "Plain (with parentheses) text."),
    ],
)
def test_signatures_in_front_are_removed(text: str, expected: str) -> None:
    assert strip_signature(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Sort a list. Then stop.", "Sort a list."),
        ("Sort, e.g. a list. Stop.", "Sort, e.g. a list."),
        ("Version 1.2 of it. Stop.", "Version 1.2 of it."),
        ("By J. Doe alone. Stop.", "By J. Doe alone."),
        ("No end", "No end"),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    found, rest = first_sentence(text)
    assert found == sentence
    assert found + rest == text


def test_markup_goes_words_stay() -> None:
    text = "See :func:`~torch.add` and :ref:`the guide <guide>`, ``x``.\n-----\n<A at 0x7f00aa>"
    found = " ".join(plain_text(text).split())
    assert found == "See torch.add and the guide, x. <A>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Solve a system.", f"{NAME_TOKEN} a system."),
        ("np.linalg.solve(a) and numpy.linalg.solve", f"{NAME_TOKEN}(a) and {NAME_TOKEN}"),
        ("resolve, solver and solve_it stay", "resolve, solver and solve_it stay"),
        ("SOLVE.", f"{NAME_TOKEN}."),
    ],
)
def test_a_name_is_hidden_as_a_whole_word(text: str, expected: str) -> None:
    assert hide_name(text, "numpy.linalg.solve", "numpy.linalg.solve") == expected


def test_a_methods_class_is_hidden_too() -> None:
    text = "Ridge.fit fits a Ridge; see sklearn.linear_model.Ridge.fit"
    hidden = hide_name(text, "sklearn.linear_model.Ridge.fit", "sklearn.linear_model.Ridge")
    assert hidden == f"{NAME_TOKEN} fits a {NAME_TOKEN}; see {NAME_TOKEN}"


def test_make_pair_cuts_query_and_document() -> None:
    doc = """merge(a, b) -> list

    Merge two sorted lists. Equal ones keep their order.

    Parameters
    ----------
    a, b : list
        Sorted lists; merge(a, b) needs them to be sorted already, or the result is not.
    """
    pair = make_pair("m.merge", "m.merge", "x", doc)
    assert pair is not None
    assert pair.query == f"{NAME_TOKEN} two sorted lists."
    assert pair.document.startswith("Equal ones keep their order. Parameters a, b : list Sorted")
    assert "merge" not in (pair.query + pair.document).lower()


@pytest.mark.parametrize(
    "doc", ["", "Too short.", "Alias for the other function. " + "word " * 30, "f(unbalanced"]
)
def test_make_pair_refuses_what_answers_nothing(doc: str) -> None:
    assert make_pair("m.f", "m.f", "x", doc) is None


# --- collecting ---------------------------------------------------------------------------------


def test_sources_hold_nothing_dangerous_or_private() -> None:
    assert [source.domain for source in SOURCES] == [
        "numpy",
        "scipy",
        "scikit-learn",
        "pytorch",
        "stdlib",
    ]
    dangerous = {"antigravity", "this", "idlelib", "turtledemo", "tkinter", "lib2to3", "distutils"}
    assert not dangerous & set(STDLIB_MODULES)
    assert not any(name.startswith("_") for name in STDLIB_MODULES)


def test_extraction_finds_known_objects_and_hides_their_names(
    small_pairs: list[DocstringPair],
) -> None:
    by_name = {pair.name: pair for pair in small_pairs}
    pair = by_name["statistics.harmonic_mean"]
    assert pair.query == "Return the harmonic mean of data."
    assert len(small_pairs) > 40
    for pair in small_pairs:
        last = pair.name.rsplit(".", 1)[1].lower()
        assert last not in pair.query.lower().replace("-", " ").split()
        assert pair.domain == "small"


def test_no_text_twice(small_pairs: list[DocstringPair]) -> None:
    for texts in ([p.query for p in small_pairs], [p.document for p in small_pairs]):
        assert max(Counter(texts).values()) == 1


NAMES = ("difflib", "json", "logging", "statistics", "textwrap")


def digest() -> str:
    pairs = extract_pairs([Source("small", modules=NAMES, owners=frozenset(NAMES))])
    return hashlib.sha256(json.dumps([vars(pair) for pair in pairs]).encode()).hexdigest()


def test_extraction_is_the_same_in_every_process() -> None:
    """In this one, which has imported much, and in a new one with other hashes of strings."""
    done = subprocess.run(
        [sys.executable, "-c", "from tests.demo.test_docstrings import digest; print(digest())"],
        env=os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == digest()


def test_import_output_and_warnings_are_silenced(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "noisy_package"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import warnings; print('hello'); warnings.warn('old')\n"
        f"def f():\n    '''Do the thing at once. {_words('n', 20)}'''\n"
    )
    (package / "broken.py").write_text("raise SystemExit(3)")
    (package / "tests").mkdir()
    (package / "tests" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = Source("n", modules=("noisy_package",), owners=frozenset({"noisy_package"}))
    pairs = extract_pairs([source])
    assert [pair.name for pair in pairs] == ["noisy_package.f"]
    assert "hello" not in "".join(capfd.readouterr())


# --- duplicates and splits ----------------------------------------------------------------------


def test_equal_and_near_identical_texts_are_dropped() -> None:
    document = _words("a", 80)
    changed = document.split()
    changed[70] = "other"
    pairs = [
        _pair("a", "first query here", document),
        _pair("b", "second query here", document + " 12"),  # equal but for a number
        _pair("c", "third query here", " ".join(changed)),  # one word of eighty differs
        _pair("d", "First query, here!", _words("d", 80)),  # an equal query
        _pair("e", "fifth query here", _words("e", 80)),
    ]
    assert [pair.name for pair in drop_duplicates(pairs)] == ["a", "e"]


def test_splits_are_disjoint_balanced_and_seeded() -> None:
    pairs = _many_pairs({"x": 90, "y": 60, "z": 200})
    splits = split_pairs(pairs, train_pairs=150, held_out_pairs=30, seed=0)
    train, held_out = splits
    assert Counter(p.domain for p in held_out) == {"x": 10, "y": 10, "z": 10}
    counts = Counter(p.domain for p in train)
    assert sum(counts.values()) == 150
    assert counts["y"] <= 50 and abs(counts["x"] - counts["z"]) <= 2
    assert not {p.owner for p in train} & {p.owner for p in held_out}
    assert splits == split_pairs(pairs, train_pairs=150, held_out_pairs=30, seed=0)
    assert splits == split_pairs(pairs[::-1], train_pairs=150, held_out_pairs=30, seed=0)
    assert splits != split_pairs(pairs, train_pairs=150, held_out_pairs=30, seed=1)


def test_real_splits_share_no_text(small_pairs: list[DocstringPair]) -> None:
    splits = split_pairs(small_pairs, train_pairs=20, held_out_pairs=10)
    assert [len(part) for part in splits] == [20, 10]
    train, held_out = (
        {text for pair in part for text in (pair.name, pair.query, pair.document)}
        for part in splits
    )
    assert not train & held_out


def test_too_few_pairs_is_an_error_that_names_the_domain() -> None:
    with pytest.raises(ValueError, match=r"held_out_pairs=40.*'y' has 9 pairs"):
        split_pairs(_many_pairs({"x": 90, "y": 9}), train_pairs=10, held_out_pairs=40)


def test_pairs_can_be_written_as_json(small_pairs: list[DocstringPair]) -> None:
    assert json.loads(json.dumps(vars(small_pairs[0])))["name"] == small_pairs[0].name
