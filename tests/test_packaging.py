"""The layout's rules, the bounds and locks of releases, and what setup.py decides."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import moe_fast

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# --- the layout ----------------------------------------------------------------------------------


def test_kernels_is_no_package():
    # transformers would take it for Hugging Face's `kernels`: see docs/packaging.md.
    assert not list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "kernels" / "triton").exists()


def test_kernels_know_nothing_of_moe_fast():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.partition(".")[0] == "moe_fast"], path


def test_triton_ops_is_part_of_moe_fast():
    spec = find_spec("moe_fast.triton_ops")
    assert spec is not None
    assert Path(spec.origin).parent.name == "triton_ops"


def test_version_has_one_source():
    attr = PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attr == "moe_fast.version.__version__"
    assert runpy.run_path(str(ROOT / "moe_fast" / "version.py"))["__version__"] == (
        moe_fast.__version__
    )


# --- releases: pyproject.toml's bounds and the locks written from them ----------------------------


def direct_requirements() -> dict[str, Requirement]:
    """What the core and the extra ``dev`` ask for, moe_fast's own extras resolved."""
    project = PYPROJECT["project"]
    extras, lines = ["dev"], list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if requirement.name == "moe-fast":
                extras += sorted(requirement.extras)
            else:
                lines.append(line)
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins(name: str, python: str = "3.11") -> dict[str, Version]:
    """The pins of a constraints file that hold on Linux for ``python``."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==" and not Version(specifier.version).local, line
            if requirement.marker is None or requirement.marker.evaluate(environment):
                found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def test_torch_is_chosen_by_hand_alone():
    assert not [r for r in PYPROJECT["build-system"]["requires"] if r.startswith("torch")]
    assert {"torch", "triton"} <= set(pins("constraints-torch.txt"))
    assert not [n for n in pins("constraints.txt") if n.startswith(("torch", "triton", "nvidia"))]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_all_that_make_installs(python):
    locked = pins("constraints.txt", python) | pins("constraints-torch.txt", python)
    for name, requirement in direct_requirements().items():
        assert requirement.specifier.contains(locked[name]), requirement


def test_the_oldest_releases_are_the_lower_bounds():
    oldest = pins("constraints-oldest.txt")
    assert str(oldest["torch"]) == "2.11.0" and str(oldest["transformers"]) == "5.17.0"
    assert str(oldest["sentence-transformers"]) == "6.2.0"
    for name, requirement in direct_requirements().items():
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        for bound in bounds:
            assert f"{oldest[name]}.".startswith(f"{bound}."), requirement
        assert bounds or name == "triton", requirement  # triton's is torch's choice


def test_what_changes_under_us_has_an_upper_bound():
    for name, requirement in direct_requirements().items():
        bounded = any(s.operator == "<" for s in requirement.specifier)
        assert bounded or name in {"pyarrow", "triton"}, requirement


# --- what setup.py decides -----------------------------------------------------------------------


@pytest.fixture
def setup_py(monkeypatch) -> dict:
    """setup.py's globals, without running it, and without the caller's settings."""
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    monkeypatch.delenv("MOE_FAST_NATIVE", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup_py")


@pytest.mark.parametrize("value", ["0", "1", "auto", "AUTO", ""])
def test_native_mode_allows(setup_py, monkeypatch, value):
    monkeypatch.setenv("MOE_FAST_NATIVE", value)
    assert setup_py["native_mode"]() == (value.lower() or "auto")


def test_native_mode_refuses(setup_py, monkeypatch):
    monkeypatch.setenv("MOE_FAST_NATIVE", "yes")
    with pytest.raises(SystemExit, match="MOE_FAST_NATIVE must be 0, 1 or auto; got 'yes'"):
        setup_py["native_mode"]()


@pytest.mark.parametrize(
    ("missing", "torch_version", "reason"),
    [
        ([], None, "torch cannot be imported"),
        ([], "2.9.1+cpu", r"torch 2.9.1\+cpu is older than 2.11"),
        (["cmake"], "2.11.0", "cmake was not found"),
        (["ninja", "make"], "2.11.0", "neither ninja nor make was found"),
        (["c++", "g++", "clang++"], "2.11.0", r"no C\+\+ compiler was found"),
    ],
)
def test_what_is_missing_is_named(setup_py, monkeypatch, capsys, missing, torch_version, reason):
    torch = SimpleNamespace(__version__=torch_version) if torch_version else None
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: None if name in missing else f"bin/{name}"
    )
    assert setup_py["decide_native"]() is False
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"moe_fast: no native library, pure Python only: .*{reason}", line)
    monkeypatch.setenv("MOE_FAST_NATIVE", "1")
    with pytest.raises(SystemExit, match=f"MOE_FAST_NATIVE=1, but .*{reason}"):
        setup_py["decide_native"]()


def test_nvcc_of_pip_is_found(setup_py, monkeypatch, tmp_path):
    for version in ("cu12", "cu13"):
        program = tmp_path / "nvidia" / version / "bin" / "nvcc"
        program.parent.mkdir(parents=True)
        program.touch()
    (tmp_path / "nvidia" / "cublas").mkdir()
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("LIBRARY_PATH", "/elsewhere")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    found = setup_py["cuda_environment"]()
    assert found["CUDACXX"] == str(tmp_path / "nvidia" / "cu13" / "bin" / "nvcc")
    assert found["LIBRARY_PATH"] == f"{tmp_path}/nvidia/cu13/lib{os.pathsep}/elsewhere"
    monkeypatch.setenv("CUDACXX", "/another/nvcc")
    assert setup_py["cuda_environment"]() == {}
