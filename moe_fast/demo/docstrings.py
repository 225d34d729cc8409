"""Makes question-and-answer pairs of the API documentation in the installed packages.

Every machine that can run the demo already holds a few thousand short technical texts: the
docstrings of NumPy, SciPy, scikit-learn, PyTorch and the standard library. One public object gives
one pair:

- query: the first sentence of its docstring;
- document: the rest of the docstring (at most ``MAX_DOCUMENT_WORDS`` words are kept).

The object's own name would give the answer away, so it is hidden in both texts (`hide_name`).

What keeps the held-out numbers honest:

- aliases of one object give one pair, and so do texts that are equal after hiding the names;
- of near-identical documents (inherited, generated from a template) only the first in sorted order
  is kept, so none can stand in the training split and have its twin in the held-out one;
- a class and its methods always go to the same split.

The result depends on the package versions and the seed alone: names are sorted, and random choices
are made by SHA-256, so neither the hash seed nor the order of imports matters.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import logging
import pkgutil
import re
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# An ordinary word: one token in every tokenizer's vocabulary and grammatical where a name stood. A
# special token such as [MASK] would carry its own pretraining meaning, and an invented one an
# untrained embedding.
NAME_TOKEN = "something"

MIN_QUERY_WORDS = 3
MAX_QUERY_WORDS = 40
MIN_DOCUMENT_WORDS = 12
MAX_DOCUMENT_WORDS = 160  # more than the 128 tokens that the demo's models read

# Path components that never hold public documentation.
PRIVATE_PARTS = frozenset({"conftest", "setup", "test", "testing", "tests", "testutils", "version"})
# Standard library modules that act when imported, open windows, need a terminal, or are no API ...
_UNSAFE_STDLIB = """
antigravity curses idlelib nt nturl2path posix pydoc_data readline rlcompleter site sitecustomize
this tkinter turtle turtledemo usercustomize
"""
# ... and those deprecated in Python 3.11 (a fixed list: their warning shows only on the first
# import).
_DEPRECATED_STDLIB = """
aifc asynchat asyncore audioop cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap msilib nis
nntplib ossaudiodev pipes smtpd sndhdr spwd sre_compile sre_constants sre_parse sunau telnetlib uu
xdrlib
"""
STDLIB_MODULES = tuple(
    name
    for name in sorted(sys.stdlib_module_names)
    if not name.startswith("_") and name not in (_UNSAFE_STDLIB + _DEPRECATED_STDLIB).split()
)
# Not all of torch: its compiler, distributed launchers and exporters register things when imported.
_TORCH_MODULES = """
torch torch.autograd torch.distributions torch.fft torch.func torch.futures torch.jit torch.library
torch.linalg torch.nn torch.optim torch.overrides torch.profiler torch.random torch.serialization
torch.signal torch.sparse torch.special torch.utils.data
"""
# Legacy types that repeat the methods of torch.Tensor.
_LEGACY_TENSORS = "BFloat16 Bool Byte Char Double Float Half Int Long Short"


@dataclass(frozen=True)
class Source:
    """The packages that one domain's docstrings come from.

    Attributes:
        domain: name of the domain.
        modules: modules to walk, each with all its public submodules.
        owners: top-level packages; an object whose module is in another one is not used.
        skip: modules (with everything below them) and objects to leave out, because they are
            deprecated, generated or internal.
        private_bases: private base classes whose methods count as the public class's own.
    """

    domain: str
    modules: tuple[str, ...]
    owners: frozenset[str]
    skip: frozenset[str] = frozenset()
    private_bases: frozenset[str] = frozenset()


SOURCES: tuple[Source, ...] = (
    Source(
        "numpy",
        modules=("numpy",),
        owners=frozenset({"numpy"}),
        skip=frozenset(
            {"numpy.core", "numpy.distutils", "numpy.f2py", "numpy.matlib", "numpy.typing"}
        ),
    ),
    Source(
        "scipy",
        modules=("scipy",),
        owners=frozenset({"scipy"}),
        skip=frozenset({"scipy.linalg.blas", "scipy.linalg.lapack", "scipy.misc"}),
    ),
    Source(
        "scikit-learn",
        modules=("sklearn",),
        owners=frozenset({"sklearn"}),
        # importing sklearn.experimental.* switches features on
        skip=frozenset(
            {"sklearn.experimental", "sklearn.externals", "sklearn.utils.estimator_checks"}
        ),
    ),
    Source(
        "pytorch",
        modules=tuple(_TORCH_MODULES.split()),
        owners=frozenset({"torch"}),
        skip=frozenset(f"torch.{kind}Tensor" for kind in _LEGACY_TENSORS.split()),
        private_bases=frozenset({"TensorBase"}),
    ),
    Source("stdlib", modules=STDLIB_MODULES, owners=frozenset(sys.stdlib_module_names)),
)
DOMAINS: tuple[str, ...] = tuple(source.domain for source in SOURCES)


@dataclass(frozen=True)
class DocstringPair:
    """The docstring of one object, divided into a query and a document.

    Attributes:
        name: dotted name of the object, e.g. ``numpy.linalg.solve``.
        owner: what decides the split: the class for a class and its methods, else the object.
        domain: one of ``DOMAINS``.
        query: first sentence, the name hidden.
        document: the rest, the name hidden.
    """

    name: str
    owner: str
    domain: str
    query: str
    document: str


# -------------------------------------------------------------------------------------------------
# From packages to objects
# -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Suppress the output, warnings and logs of imports within the block."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _is_public(module_name: str) -> bool:
    parts = module_name.split(".")
    return not any(part.startswith("_") or part in PRIVATE_PARTS for part in parts)


def walk_modules(
    name: str, skip: frozenset[str] = frozenset(), depth: int = 3
) -> Iterator[ModuleType]:
    """Import a module and its public submodules, in sorted order.

    Args:
        name: dotted name to start from.
        skip: names left out, with everything below them.
        depth: levels of submodules to go down.

    Yields:
        Each module that can be imported; modules that need another platform or a missing package
        are skipped.
    """
    if name in skip or not _is_public(name):
        return
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit):  # another platform's module, or one that needs more packages
        return
    yield module
    if depth and hasattr(module, "__path__"):
        children = sorted(info.name for info in pkgutil.iter_modules(module.__path__))
        for child in children:
            yield from walk_modules(f"{name}.{child}", skip, depth - 1)


def _own_docstring(thing: Any) -> str | None:
    """Return the docstring of the object itself; None if it only has that of its type."""
    text = getattr(thing, "__doc__", None)
    if not isinstance(text, str) or (not inspect.isclass(thing) and text == type(thing).__doc__):
        return None
    return text


def _belongs(thing: Any, owners: frozenset[str]) -> bool:
    if isinstance(thing, functools.cached_property):
        thing = thing.func  # the module of the property itself is functools
    module = getattr(thing, "__module__", None)
    return not isinstance(module, str) or module.split(".")[0] in owners


def _is_deprecated(thing: Any, text: str) -> bool:
    return hasattr(thing, "__deprecated__") or "deprecated" in text[:400].lower()


def _members(cls: type, private_bases: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that the class or a private base defines, sorted."""
    members: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base is cls or base.__name__ in private_bases:
            members.update(vars(base))
    for name in sorted(members):
        member = members[name]
        if not name.startswith("_") and not inspect.isclass(member):
            yield name, getattr(member, "__func__", member)  # look inside class and static methods


def find_docstrings(
    modules: Iterable[ModuleType], source: Source
) -> Iterator[tuple[str, str, Any, str]]:
    """Yield the public objects of one domain that have a docstring of their own.

    Only the contents of a module's ``vars`` are used; names that a deprecated module provides
    through ``__getattr__`` are left out.

    Yields:
        (dotted name, owner, object, docstring); aliases come more than once.
    """
    for module in modules:
        public = getattr(module, "__all__", None) or vars(module)
        for name in sorted(n for n in public if isinstance(n, str) and not n.startswith("_")):
            owner, thing = f"{module.__name__}.{name}", vars(module).get(name)
            if thing is None or inspect.ismodule(thing) or owner in source.skip:
                continue
            if not _belongs(thing, source.owners):
                continue
            candidates = [(owner, thing)]
            if inspect.isclass(thing):
                members = _members(thing, source.private_bases)
                candidates += [(f"{owner}.{key}", value) for key, value in members]
            for full_name, candidate in candidates:
                # other packages patch methods in: transformers, for one, into logging.Logger
                text = _own_docstring(candidate) if _belongs(candidate, source.owners) else None
                if text and not _is_deprecated(candidate, text):
                    yield full_name, owner, candidate, text


# -------------------------------------------------------------------------------------------------
# From docstrings to pairs
# -------------------------------------------------------------------------------------------------

_SIGNATURE = re.compile(r"^[\w.]+\(")
_RETURNS = re.compile(r"^\s*(?:->|=>)[^\n]*?(?=\.\s|\n|--|$)[.\-\s]*")
_ROLE = re.compile(r":[\w:+-]+:`~?\.?([^`<]*?)\s*(?:<[^`]*>)?`")
_DIRECTIVE = re.compile(r"\.\.\s+[\w:-]+::")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_RULE = re.compile(r"([-=~^*#+])\1{2,}")  # underlined headings, tables
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|etc|resp|approx|[A-Z])|\.\.)\.$")
_SENTENCE_END = re.compile(r"[.!?](?=\s)")


def strip_signature(text: str) -> str:
    """Remove call signatures that C extensions put in front: ``abs(x, /) -> Tensor``."""
    text = text.strip()
    while _SIGNATURE.match(text):
        end = _closing_parenthesis(text)
        if end is None:
            return ""  # unbalanced: nothing that can be read as a sentence
        text = _RETURNS.sub("", text[end + 1 :], count=1).lstrip(" \n:.-")
    return text


def _closing_parenthesis(text: str) -> int | None:
    """Return the position at which the first opening parenthesis is closed; None if it is not."""
    level = 0
    for position, char in enumerate(text):
        level += (char == "(") - (char == ")")
        if char == ")" and level == 0:
            return position
    return None


def plain_text(text: str) -> str:
    """Remove reStructuredText markup, and keep the words and the paragraphs."""
    text = _ADDRESS.sub("", text)
    text = _RULE.sub(" ", text)
    text = _DIRECTIVE.sub(" ", text)
    text = _ROLE.sub(r"\1", text)
    return text.replace("`", "").replace(">>>", " ")


def first_sentence(paragraph: str) -> tuple[str, str]:
    """Cut a paragraph after its first sentence: (sentence, rest). Abbreviations do not end it."""
    for match in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[: match.end()]):
            return paragraph[: match.end()], paragraph[match.end() :]
    return paragraph, ""


def hide_name(text: str, name: str, owner: str) -> str:
    """Replace the object's name by ``NAME_TOKEN``, whatever its case.

    It replaces the last part of the dotted name as a whole word, together with any dotted path
    before it (all of ``np.linalg.solve`` and of ``scipy.linalg.solve``), and the class of a method
    in the same way.
    """
    words = {part.rsplit(".", 1)[-1] for part in (name, owner)}
    pattern = "|".join(re.escape(word) for word in sorted(words, key=lambda w: (-len(w), w)))
    return re.sub(rf"(?<![\w.])(?:\w+\.)*(?:{pattern})\b", NAME_TOKEN, text, flags=re.IGNORECASE)


def make_pair(name: str, owner: str, domain: str, docstring: str) -> DocstringPair | None:
    """Cut a docstring into query and document; None if it is too short or only points elsewhere."""
    text = strip_signature(plain_text(inspect.cleandoc(docstring)))
    paragraph, _, rest = text.partition("\n\n")
    query, tail = first_sentence(" ".join(paragraph.split()))
    document = " ".join(f"{tail} {rest}".split()[:MAX_DOCUMENT_WORDS])
    query, document = hide_name(query, name, owner), hide_name(document, name, owner)
    if not MIN_QUERY_WORDS <= len(query.split()) <= MAX_QUERY_WORDS:
        return None
    if len(re.findall(r"[A-Za-z]{2,}", document)) < MIN_DOCUMENT_WORDS:
        return None
    if query.lower().startswith(("alias", "see ", "same as", "this is an alias")):
        return None
    return DocstringPair(name, owner, domain, query, document)


# -------------------------------------------------------------------------------------------------
# Deduplication, balance, split
# -------------------------------------------------------------------------------------------------

_SHINGLE_WORDS = 4
_SKETCH_SIZE = 32
_SHINGLED_WORDS = 120
_NEAR_IDENTICAL = 0.7  # share of the sketch


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def _sketch(text: str) -> list[int]:
    """Return the smallest hashes of a text's word 4-grams; similar texts share most of them.

    A bottom-k sketch (Broder, "On the resemblance and containment of documents", 1997).
    """
    words = _normalised(text).split()[:_SHINGLED_WORDS]
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    shingles = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(count)}
    return sorted(zlib.crc32(shingle.encode()) for shingle in shingles)[:_SKETCH_SIZE]


def drop_duplicates(pairs: Iterable[DocstringPair]) -> list[DocstringPair]:
    """Keep the first of all pairs with an equal query or an equal or near-identical document.

    Near-identical: 70 % of the document's sketch is shared with one pair already kept.
    """
    kept: list[DocstringPair] = []
    seen: set[str] = set()
    pairs_by_hash: dict[int, list[int]] = defaultdict(list)
    for pair in pairs:
        texts = {_normalised(pair.query), _normalised(pair.document)}
        sketch = _sketch(pair.document)
        shared = Counter(index for value in sketch for index in pairs_by_hash[value])
        if texts & seen or max(shared.values(), default=0) >= _NEAR_IDENTICAL * len(sketch):
            continue
        seen |= texts
        for value in sketch:
            pairs_by_hash[value].append(len(kept))
        kept.append(pair)
    return kept


def _alias_order(found: tuple[str, str, Any, str]) -> tuple[bool, bool, int, int, str]:
    """Sort key: aliases in an object's home package first, under its own name, then the shortest.

    The home package is the first two levels of ``__module__``: a class of
    ``sklearn.preprocessing._label`` is called ``sklearn.preprocessing.LabelEncoder``, although
    ``sklearn.calibration`` imports it too.
    """
    name, _, thing, _ = found
    home = str(getattr(thing, "__module__", None) or "").split(".")[:2]
    away = name.split(".")[: len(home)] != home
    renamed = not name.endswith(f".{getattr(thing, '__qualname__', '')}")
    return away, renamed, name.count("."), len(name), name


def extract_pairs(
    sources: Sequence[Source] = SOURCES,
    progress: Callable[[Iterable[Source]], Iterable[Source]] = iter,
) -> list[DocstringPair]:
    """Extract all distinct pairs, sorted by domain (in the sources' order) and name.

    Args:
        sources: the sources of the docstrings.
        progress: wraps the iteration over sources, e.g. ``tqdm``.
    """
    modules: dict[str, list[ModuleType]] = defaultdict(list)
    for source in progress(sources):
        for root in source.modules:
            depth = 0 if root == "torch" else 3  # its wanted submodules are listed one by one
            with quiet_imports():
                modules[source.domain] += walk_modules(root, source.skip, depth)
    pairs: list[DocstringPair] = []
    seen_objects: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice
    for source in sources:
        # only now, with all of them imported: SciPy, for one, edits docstrings of NumPy
        with quiet_imports():
            found = list(find_docstrings(modules[source.domain], source))
        for name, owner, thing, text in sorted(found, key=_alias_order):
            if id(thing) in seen_objects:
                continue
            seen_objects[id(thing)] = thing
            pair = make_pair(name, owner, source.domain, text)
            if pair is not None:
                pairs.append(pair)
    order = {source.domain: index for index, source in enumerate(sources)}
    return drop_duplicates(sorted(pairs, key=lambda pair: (order[pair.domain], pair.name)))


def _rank(seed: int, name: str) -> str:
    """Return a pseudo-random sort key that is the same on every machine and Python version."""
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _take(
    pairs: Sequence[DocstringPair], count: int, seed: int
) -> tuple[list[DocstringPair], list[DocstringPair]]:
    """Choose `count` pairs, owner by owner: (the chosen, all pairs of the other owners)."""
    groups: dict[str, list[DocstringPair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.owner].append(pair)
    chosen: list[DocstringPair] = []
    rest: list[DocstringPair] = []
    for owner in sorted(groups, key=lambda owner: _rank(seed, owner)):
        space = count - len(chosen)
        if space <= 0:
            rest += groups[owner]
        else:  # the last owner may be cut; what is cut off is in neither part
            chosen += sorted(groups[owner], key=lambda pair: _rank(seed, pair.name))[:space]
    return chosen, rest


def _even_shares(available: dict[str, int], total: int) -> dict[str, int]:
    """Divide `total` equally among the domains; if one has too few pairs, the others give more."""
    shares: dict[str, int] = {}
    left = total
    for position, domain in enumerate(
        sorted(available, key=lambda domain: (available[domain], domain))
    ):
        shares[domain] = min(available[domain], left // (len(available) - position))
        left -= shares[domain]
    return shares


def split_pairs(
    pairs: Sequence[DocstringPair], *, train_pairs: int, held_out_pairs: int, seed: int = 0
) -> tuple[list[DocstringPair], list[DocstringPair]]:
    """Split pairs into training and held-out pairs; an owner's pairs are all in one of the two.

    Every domain has the same number of held-out pairs, and as far as possible of training pairs.

    Args:
        pairs: output of `extract_pairs`.
        train_pairs: training pairs over all domains (fewer when there are no more).
        held_out_pairs: held-out pairs over all domains (rounded down to a multiple of the domains).
        seed: chooses and shuffles.

    Raises:
        ValueError: a domain has too few pairs for its held-out share and one training pair.
    """
    by_domain: dict[str, list[DocstringPair]] = defaultdict(list)
    for pair in pairs:
        by_domain[pair.domain].append(pair)
    held_out_share = held_out_pairs // len(by_domain)
    parts = {domain: _take(found, held_out_share, seed) for domain, found in by_domain.items()}
    shares = _even_shares({domain: len(rest) for domain, (_, rest) in parts.items()}, train_pairs)
    for domain, (chosen, _) in parts.items():
        if min(held_out_share, shares[domain]) < 1 or len(chosen) < held_out_share:
            raise ValueError(
                f"train_pairs={train_pairs}, held_out_pairs={held_out_pairs}: each of "
                f"{len(by_domain)} domains must give {held_out_share} (at least 1) held-out pairs "
                f"and a training pair, but {domain!r} has {len(by_domain[domain])} pairs in all"
            )
    held_out = [pair for chosen, _ in parts.values() for pair in chosen]
    train = [
        pair for domain, (_, rest) in parts.items() for pair in _take(rest, shares[domain], seed)[0]
    ]

    def shuffled(part: list[DocstringPair]) -> list[DocstringPair]:
        return sorted(part, key=lambda pair: _rank(seed, pair.name))

    return shuffled(train), shuffled(held_out)
