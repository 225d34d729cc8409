"""The docs site names pages, images and objects that are there; `make docs` builds it strictly."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import moe_fast

ROOT = Path(__file__).parent.parent
DOCS = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")]
IDENTIFIERS = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]


def pages_of(navigation):
    for entry in navigation:
        (target,) = entry.values()
        yield from [target] if isinstance(target, str) else pages_of(target)


def test_the_navigation_is_the_pages():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = list(pages_of(settings["nav"]))
    assert [page for page in pages if not (ROOT / page).is_file()] == []
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert ours - set(pages) == set(), "pages that no menu leads to"


@pytest.mark.parametrize("name", IDENTIFIERS)
def test_what_the_reference_shows_is_public(name):
    pytest.importorskip("sentence_transformers", reason="needs the extra moe-fast[train]")
    assert pkgutil.resolve_name(name).__doc__


def test_the_reference_shows_every_operation_and_what_the_package_exports():
    shown = {name.removeprefix("moe_fast.") for name in IDENTIFIERS}
    exported = set(moe_fast.__all__) - {"__version__", "losses", "ops"}
    backends = {"available_backends", "show_backends", "use_backend"}  # shown among the operations
    made = {"MoEBertLayer"}  # from the table of encoders: MoELayer is shown
    assert exported - backends - made - shown == set()
    functions = {name for name in moe_fast.ops.__all__ if name.islower()}
    assert {f"ops.{name}" for name in functions} - shown == set()


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []
