"""Reads settings from a YAML file, and writes the settings of a run to one.

The keys of a file are the names of the command's flags and arguments, with dashes or underscores.
Flags override the file, and the file overrides the defaults. The whole file is checked before
anything runs: unknown keys are errors, and no value is cast to another type. For a flag that may be
given several times, a single text counts as a list of one, as on the command line.
"""

from __future__ import annotations

import difflib
import re
import sys
import types
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from moe_fast.files import write_text
from moe_fast.messages import reason, shown

# Settings with values NAME=VALUE, which may also be written as a mapping of names to values.
NAMED = ("data", "eval_data", "columns", "models")
MAX_BYTES = 1 << 18  # of a file; PyYAML takes its time
_LARGEST = sys.float_info.max


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and reads 2e-5 as a number (as YAML 1.2)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # nested, they grow without bound
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not read", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, Hashable) or key in seen:
                problem = "is there twice" if isinstance(key, Hashable) else "is no name"
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} {problem}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes the texts that the loader would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(  # type: ignore[no-untyped-call]
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def read_config(path: Path, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """Read and check the settings in a YAML file.

    Args:
        path: the file, a mapping of names to values.
        allowed: {name of a parameter, with underscores: its type}. Types are ``str``, ``int``,
            ``float``, ``bool``, ``Path``, ``Literal``, lists of them, and unions with ``None``.
            A parameter in `NAMED` may be a mapping of names to a text or a list of texts: ``data:
            {law: law.jsonl}`` means ``data: [law=law.jsonl]``.

    Returns:
        {name with underscores: value}; keys whose value is null are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML mapping, or is too long or too deeply nested.
        ValueError: a key is unknown or given twice; the error names the nearest known keys.
        ValueError: a value is of the wrong type.
    """
    settings = {}
    for key, value in load_mapping(path).items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            raise ValueError(f"{path}: {_unknown(str(key), allowed)}")
        if name in settings:
            raise ValueError(f"{path}: the key {name.replace('_', '-')!r} is there twice")
        if isinstance(value, dict) and name in NAMED:
            value = _named(value, f"{path}: {name.replace('_', '-')}")
        if isinstance(value, str) and list[str] in _members(allowed[name]):
            value = [value]
        if not _fits(value, allowed[name]):
            mapping = ", or a mapping of names to texts" if name in NAMED else ""
            raise ValueError(
                f"{path}: {key} must be {_describe(allowed[name])}{mapping}; got {shown(value)} "
                f"({type(value).__name__})"
            )
        settings[name] = value
    return {name: value for name, value in settings.items() if value is not None}


def write_config(path: Path, settings: Mapping[str, Any], title: str) -> None:
    """Write settings as YAML that ``--config`` reads back; a comment line holds ``title``."""
    plain = plain_settings(settings)
    body = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if yaml.load(body, _Loader) != plain:  # YAML reads some rare characters as line ends
        body = yaml.dump(plain, Dumper=_Dumper, sort_keys=False)
    write_text(path, f"# {title}\n{body}")


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert settings to the form that is written: flags' names, paths as text, no ``None``."""
    return {
        name.replace("_", "-"): _plain(value)
        for name, value in settings.items()
        if value is not None
    }


def load_mapping(path: Path) -> dict[Any, Any]:
    """Read a YAML file that must be a mapping, without checking its settings; see `read_config`."""
    if not path.is_file():
        raise FileNotFoundError(f"--config: there is no file {path}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path}: {size:,} bytes; a file of settings has at most {MAX_BYTES:,}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except RecursionError as error:
        raise ValueError(f"{path}: not valid YAML (nested too deeply)") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: no UTF-8, no date
        raise ValueError(f"{path}: not valid YAML ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: must be a mapping of settings (name: value); got {type(content).__name__}"
        )
    return content


def _named(values: dict[Any, Any], where: str) -> list[str]:
    """Convert a mapping to a list of NAME=VALUE."""
    found = []
    for name, value in values.items():
        every = value if isinstance(value, list) else [value]
        if not isinstance(name, str) or not name.strip() or "=" in name:
            raise ValueError(f"{where}: a name must be text without '='; got {shown(name)}")
        if not every or not all(isinstance(one, str) and one for one in every):
            raise ValueError(f"{where}: {shown(name)} must be text or texts; got {shown(value)}")
        found += [f"{name}={one}" for one in every]
    return found


def _unknown(key: str, allowed: Mapping[str, Any]) -> str:
    known = sorted(name.replace("_", "-") for name in allowed)
    nearest = difflib.get_close_matches(key[:100].replace("_", "-"), known, n=3, cutoff=0.5)
    if nearest:
        return f"unknown key {shown(key)}; the nearest known are {', '.join(nearest)}"
    return f"unknown key {shown(key)}; known are {', '.join(known)}"


def _members(kind: Any) -> tuple[Any, ...]:
    """Return the types in a union; for any other type, this type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and -_LARGEST <= value <= _LARGEST  # not NaN either


# {type of a parameter: (what it is called, what a value must be)}
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("text", lambda value: isinstance(value, str)),
    Path: ("a path", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: type(value) is int),
    float: ("a finite number", _is_number),
}


def _fits(value: Any, kind: Any) -> bool:
    for member in _members(kind):
        origin, arguments = get_origin(member), get_args(member)
        if origin is list:
            found = isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
        elif origin is Literal:
            found = isinstance(value, str) and value in arguments
        else:
            found = member in _KINDS and _KINDS[member][1](value)
        if found:
            return True
    return value is None


def _describe(kind: Any) -> str:
    parts = []
    for member in _members(kind):
        if get_origin(member) is list:
            item = _describe(get_args(member)[0])
            parts.append(
                f"{item} or a list, each {item}" if item == "text" else f"a list of {item}"
            )
        elif get_origin(member) is Literal:
            parts.append("one of " + ", ".join(get_args(member)))
        elif member in _KINDS:
            parts.append(_KINDS[member][0])
    return " or ".join(parts)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
