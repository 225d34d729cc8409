"""The layout's rules, what setup.py decides, and (slow) real wheels in fresh environments."""

from __future__ import annotations

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
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
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md")
SOURCES += ("CHANGELOG.md", "moe_fast", "kernels", "bench")
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


# --- real builds ---------------------------------------------------------------------------------
# Each works on a copy of the sources, so that nothing is left in the checkout.


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of what a build needs, nothing built."""
    pytest.importorskip("setuptools", minversion="77", reason="builds need setuptools >= 77")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command with nothing of pytest's in its environment; its output, or a failure."""
    ours = ("PYTHONPATH", "MOE_FAST_NATIVE", "CMAKE_ARGS")
    keep = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=keep | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build_wheel(source: Path, **environment: str) -> tuple[Path, str]:
    """The wheel of ``source``, and what pip and setup.py said."""
    options = ["-v", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", "wheels"]
    output = run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source, **environment)
    (wheel,) = (source / "wheels").glob("*.whl")
    return wheel, output


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment with ``wheel``, and with this one's other packages."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python),
        *("install", "--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    # A folder named by a .pth file is searched, but its own .pth files are not read: this
    # environment's editable moe_fast stays out.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    ours = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "other_packages.pth").write_text("\n".join(ours))
    return python


SMOKE = """
import pathlib, sys, torch, moe_fast
from importlib.util import find_spec
package = pathlib.Path(moe_fast.__file__).parent
assert package.is_relative_to(sys.argv[1]), package
assert find_spec("moe_fast.triton_ops") is not None and "moe_fast.triton_ops.up" not in sys.modules
plan = moe_fast.ops.plan(torch.tensor([[1], [0]]), 2)
assert plan.row_to_slot.tolist() == [1, 0]
libraries = sorted(p.name for p in package.glob("*.so"))
assert libraries == sys.argv[2:], libraries
for device, library in (("cpu", "_native.so"), ("cuda", "_native_cuda.so")):
    assert ("cpp" in moe_fast.ops.available_backends("plan", device)) == (library in libraries)
print("fine")
"""
CPU_ONLY = "-DMOE_CUDA=OFF"


def smoke(python: Path, package_in: Path, libraries: set[str], cwd: Path, *options: str) -> None:
    """Import moe_fast from ``package_in``; exactly these libraries are there, and load."""
    command = (python, *options, "-c", SMOKE, package_in, *sorted(libraries))
    assert "fine" in run(*command, cwd=cwd)


def libraries_in(wheel: Path) -> set[str]:
    return {Path(n).name for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")}


@pytest.fixture
def nvcc(setup_py) -> None:
    """Skip without nvcc; with ``CI=true`` that is a failure."""
    if os.environ.get("CUDACXX") or shutil.which("nvcc") or setup_py["cuda_environment"]():
        return
    if os.environ.get("CI") == "true":
        pytest.fail("CI needs nvcc: pip install '.[cuda-build]'", pytrace=False)
    pytest.skip("nvcc was not found: pip install -e '.[cuda-build]'")


@pytest.mark.slow
def test_cpu_wheel(source, tmp_path):
    wheel, output = build_wheel(source, MOE_FAST_NATIVE="1", CMAKE_ARGS=CPU_ONLY)
    assert output.count("moe_fast: CPU half only: MOE_CUDA=OFF.") == 1
    assert wheel.name.startswith(f"moe_fast-{moe_fast.__version__}-py3-none-")
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"moe_fast/py.typed", "moe_fast/triton_ops/__init__.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"moe_fast"}
    python = install(wheel, tmp_path / "env")
    smoke(python, tmp_path / "env", {"_native.so"}, tmp_path)
    # From the checkout's root: with -P still the installed one, without it the checkout's own.
    smoke(python, tmp_path / "env", {"_native.so"}, source, "-P")
    smoke(python, source, set(), source)


@pytest.mark.slow
def test_pure_wheel_after_a_native_one(source, tmp_path):
    left = source / "build" / "lib" / "moe_fast"  # where a pure build collects its files
    left.mkdir(parents=True)
    for name in ("_native.so", "_native_cuda.so"):
        (left / name).write_bytes(b"an earlier build's")
    wheel, output = build_wheel(source, MOE_FAST_NATIVE="0")
    assert output.count("pure Python only: MOE_FAST_NATIVE=0") == 1
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries_in(wheel) == set()
    smoke(install(wheel, tmp_path / "env"), tmp_path / "env", set(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["absent", "broken"])
def test_no_compiler(source, tmp_path, kind):
    compiler = tmp_path / "c++"
    reason = "no C++ compiler was found"
    if kind == "broken":
        compiler.write_text("#!/bin/sh\nexit 1\n")
        compiler.chmod(0o755)
        reason = "the build failed"
    wheel, output = build_wheel(source, CXX=str(compiler))
    assert output.count(f"no native library, pure Python only: {reason}") == 1
    assert libraries_in(wheel) == set()
    smoke(install(wheel, tmp_path / "env"), tmp_path / "env", set(), tmp_path)
    with pytest.raises(AssertionError, match=re.escape(f"MOE_FAST_NATIVE=1, but {reason}")):
        build_wheel(source, CXX=str(compiler), MOE_FAST_NATIVE="1")


@pytest.mark.slow
def test_cuda_wheel_from_sdist(source, tmp_path, nvcc):
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source, MOE_FAST_NATIVE="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    settings = dict(MOE_FAST_NATIVE="1", CMAKE_ARGS="-DMOE_CUDA=ON", VERBOSE="1")
    wheel, output = build_wheel(unpacked, **settings)
    assert output.count("moe_fast: CPU and CUDA halves, ") == 1
    for gpu in ("sm_80", "sm_90", "sm_100"):
        assert f"code=[{gpu}]" in output or f"code=[compute_{gpu[3:]},{gpu}]" in output, gpu
    assert libraries_in(wheel) == {"_native.so", "_native_cuda.so"}
    python = install(wheel, tmp_path / "env")
    smoke(python, tmp_path / "env", {"_native.so", "_native_cuda.so"}, tmp_path)


@pytest.mark.slow
def test_cuda_sources_that_do_not_compile(source, tmp_path, nvcc):
    """The CPU half is built all the same."""
    with (source / "kernels" / "csrc" / "cuda" / "device.cuh").open("a") as header:
        header.write("#error broken\n")
    settings = {"CMAKE_ARGS": "-DMOE_CUDA_ARCHITECTURES=80", "MAX_JOBS": "2"}
    reason = "the GPU's kernels failed to build, see above"
    wheel, output = build_wheel(source, **settings)
    assert output.count(f"moe_fast: CPU half only: {reason}") == 1
    assert libraries_in(wheel) == {"_native.so"}
    smoke(install(wheel, tmp_path / "env"), tmp_path / "env", {"_native.so"}, tmp_path)
    with pytest.raises(AssertionError, match=f"MOE_FAST_NATIVE=1, but {reason}"):
        build_wheel(source, MOE_FAST_NATIVE="1", **settings)


@pytest.mark.slow
def test_editable_install(source, tmp_path, nvcc):
    hook = "from setuptools.build_meta import build_editable as b; print(b(sys.argv[1]))"

    def build(libraries: set[str], **environment: str) -> None:
        run(*(sys.executable, "-c", f"import sys; {hook}", tmp_path), cwd=source, **environment)
        assert {path.name for path in (source / "moe_fast").glob("*.so")} == libraries

    build({"_native.so", "_native_cuda.so"}, MOE_FAST_NATIVE="1")
    (wheel,) = tmp_path.glob("*.whl")
    python = install(wheel, tmp_path / "env")
    smoke(python, source, {"_native.so", "_native_cuda.so"}, tmp_path)
    smoke(python, source, {"_native.so", "_native_cuda.so"}, source)
    build({"_native.so"}, MOE_FAST_NATIVE="1", CMAKE_ARGS=CPU_ONLY)
    build(set(), MOE_FAST_NATIVE="0")


@pytest.mark.slow
def test_a_checkout_does_not_shadow_other_packages():
    # The root first on sys.path, as with `python -m` or PYTHONPATH.
    code = "import moe_fast, moe_fast.triton_ops; from transformers import BertModel; print('fine')"
    assert "fine" in run(sys.executable, "-c", code, cwd=ROOT)
