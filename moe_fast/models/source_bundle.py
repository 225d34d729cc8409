"""Definitions of this package, copied with all that they need into the text of one file."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import itertools
from collections import defaultdict
from operator import itemgetter
from typing import NamedTuple

_PACKAGE = __name__.partition(".")[0]


class _Definition(NamedTuple):
    """A name at the top level of a module.

    Attributes:
        source: the text of its definition, or of its part of an import.
        statement: what defines it; ``None`` for an import.
        origin, imported: the module and the name in it that an import takes.
    """

    source: str
    statement: ast.stmt | None = None
    origin: str = ""
    imported: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether it is imported from this package."""
        return self.origin.partition(".")[0] == _PACKAGE

    @property
    def module(self) -> str | None:
        """The name of the module of this package that it is."""
        found = getattr(importlib.import_module(self.origin), self.imported) if self.is_ours else 0
        return found.__name__ if inspect.ismodule(found) else None


@functools.cache
def _definitions(module: str) -> dict[str, _Definition]:
    """All that a module's top level defines, by name."""
    text = inspect.getsource(importlib.import_module(module))
    lines, found = text.splitlines(), {}
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            origin = getattr(statement, "module", None) or ""
            for alias in () if origin == "__future__" else statement.names:
                name = alias.asname or (alias.name if origin else alias.name.partition(".")[0])
                found[name] = _Definition(ast.unparse(alias), None, origin, alias.name)
            continue
        first = min(n.lineno for n in (statement, *getattr(statement, "decorator_list", ())))
        source = "\n".join(lines[first - 1 : statement.end_lineno])
        for name in _names(statement):
            found[name] = _Definition(source, statement)
    return found


def _names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        targets = (ast.walk(target) for target in statement.targets)  # several names in a tuple
        return [node.id for nodes in targets for node in nodes if isinstance(node, ast.Name)]
    return [ast.unparse(statement.target)] if isinstance(statement, ast.AnnAssign) else []


class SourceBundle:
    """Definitions, each behind those that it names, and the imports from other libraries.

    Args:
        stand_in: a module whose definitions are taken in place of all others of their names.
    """

    def __init__(self, stand_in: str) -> None:
        self._stand_in = stand_in
        self._imports: dict[str, set[str]] = defaultdict(set)  # names, by how their line begins
        self._parts: list[tuple[str, str]] = []  # modules and sources, in order
        self._homes: dict[str, str] = {}  # the modules of what was taken, by name

    def text(self) -> str:
        """The imports, then the definitions, each under the name of its module."""
        imports = [start + ", ".join(sorted(names)) for start, names in self._imports.items()]
        text = "\n".join(sorted(imports))
        for home, parts in itertools.groupby(self._parts, key=itemgetter(0)):
            text += f"\n\n\n# {home}\n\n" + "\n\n\n".join(source for _, source in parts)
        return text

    def add(self, module: str, name: str) -> None:
        """Take what ``module`` calls ``name``; nothing for a local name or one of Python's.

        Raises:
            RuntimeError: two modules define something of that name.
        """
        home, found = self._find(module, name)
        if found is None or found.module:  # of a module, that is taken which is named of it
            return
        if found.is_ours:
            self.add(found.origin, found.imported)
        elif found.statement is None:
            self.add_import(found.origin, found.source)
        elif self._homes.get(name, home) != home:
            raise RuntimeError(f"{name} is defined in {home} and in {self._homes[name]}.")
        elif name not in self._homes:
            self._homes |= dict.fromkeys(_names(found.statement), home)
            for node in ast.walk(found.statement):
                if isinstance(node, ast.Name):
                    self.add(home, node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    self._add_of_module(home, node.value.id, node.attr)
            self._parts.append((home, found.source))

    def add_import(self, module: str, name: str) -> None:
        """Import a name of another library; without a module, ``name`` is one."""
        if module:
            self._imports[f"from {module} import "].add(name)
        else:
            self._imports[f"import {name}"].update()

    def _find(self, module: str, name: str) -> tuple[str, _Definition | None]:
        instead = _definitions(self._stand_in).get(name)
        if instead is not None and instead.statement is not None:
            return self._stand_in, instead
        return module, _definitions(module).get(name)

    def _add_of_module(self, user: str, name: str, attribute: str) -> None:
        """Take ``name.attribute`` of a module of this package, for which a namespace stands."""
        _, found = self._find(user, name)
        module = found.module if found is not None else None
        if module is None:
            return
        self.add(module, attribute)
        self.add_import("types", "SimpleNamespace")
        for target, value in ((name, "SimpleNamespace()"), (f"{name}.{attribute}", attribute)):
            if target not in self._homes:
                self._homes[target] = module
                self._parts.append((module, f"{target} = {value}"))
