"""What an install gives, and what is said (slow): real builds in fresh environments.

Each works on a copy of the sources, so that nothing is left in the checkout. Fresh environments see
this one's packages, or the build tools alone where torch is to be absent.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest

import moe_fast
from moe_fast.version import build_command

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md")
SOURCES += ("CHANGELOG.md", ".ci", "moe_fast", "moe_fast_cli.py", "kernels", "bench")
CPU_ONLY = "-DMOE_CUDA=OFF"
# What is compiled does not matter where only the install is tested: as fast as it compiles.
QUICK = f"{CPU_ONLY} -DCMAKE_CXX_FLAGS_RELEASE=-O0"
SITE_PACKAGES = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})

pytestmark = pytest.mark.slow


@pytest.fixture
def source(tmp_path) -> Path:
    return copy_sources(tmp_path / "source")


def copy_sources(folder: Path) -> Path:
    """What a build needs, nothing built."""
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command with nothing of pytest's in its environment; its output, or a failure."""
    ours = ("PYTHONPATH", "MOE_FAST_NATIVE", "CMAKE_ARGS", "CXX")
    keep = {k: v for k, v in os.environ.items() if k not in ours}
    keep["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), keep["PATH"]))
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


def make_environment(folder: Path, *packages: str | Path) -> Path:
    """The Python of a new environment that also sees the folders ``packages``."""
    venv.create(folder, with_pip=False)
    # A folder named by a .pth file is searched, but its own .pth files are not read: this
    # environment's editable moe_fast stays out.
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "other_packages.pth").write_text("\n".join(map(str, packages)))
    return folder / "bin" / "python"


def install(python: Path, what: Path, *options: str, **environment: str) -> tuple[set[str], str]:
    """Install into ``python``'s environment; the libraries that came along, and pip's words."""
    pip = (sys.executable, "-m", "pip", "-v", "--python", python, "install", "--no-deps")
    output = run(*pip, "--no-cache-dir", *options, what, cwd=what.parent, **environment)
    package = next(python.parents[1].glob("lib/python*/site-packages")) / "moe_fast"
    return {path.name for path in package.glob("*.so")}, output


def make_sdist(source: Path, folder: Path) -> Path:
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=source, MOE_FAST_NATIVE="0")
    (archive,) = folder.glob("*.tar.gz")
    return archive


SMOKE = """
import pathlib, sys, torch, moe_fast
from importlib.util import find_spec
package = pathlib.Path(moe_fast.__file__).parent
assert package.is_relative_to(sys.argv[1]), package
assert find_spec("moe_fast.triton_ops") is not None
assert "moe_fast.triton_ops.up_projection" not in sys.modules
plan = moe_fast.ops.plan(torch.tensor([[1], [0]]), 2)
assert plan.row_to_slot.tolist() == [1, 0]
libraries = sorted(p.name for p in package.glob("*.so"))
assert libraries == sys.argv[2:], libraries
for device, library in (("cpu", "_native.so"), ("cuda", "_native_cuda.so")):
    assert ("cpp" in moe_fast.ops.available_backends("plan", device)) == (library in libraries)
moe_fast.show_backends()
print("fine")
"""


def smoke(python: Path, package_in: Path, libraries: set[str], cwd: Path, *options: str) -> str:
    """Import moe_fast from ``package_in``; exactly these libraries are there, and load."""
    command = (python, *options, "-c", SMOKE, package_in, *sorted(libraries))
    output = run(*command, cwd=cwd)
    assert output.endswith("fine\n")
    # Without the library the first call and show_backends name the command; with it, neither.
    assert output.count(build_command()) == (0 if "_native.so" in libraries else 2), output
    return output


# --- the table ------------------------------------------------------------------------------------


@pytest.fixture
def tools(tmp_path) -> tuple[Path, Path]:
    """Build tools without torch: a folder of packages, and one of programs without a compiler."""
    packages, programs = tmp_path / "packages", tmp_path / "programs"
    packages.mkdir(), programs.mkdir()
    for name in ("setuptools", "cmake", "ninja"):
        for top in {Path(file).parts[0] for file in metadata.files(name) or []} - {"..", "."}:
            found = metadata.distribution(name).locate_file(top)
            (packages / top).symlink_to(Path(str(found)))
    for name in ("cmake", "ninja", "uname", "sh"):
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        (programs / name).symlink_to(shutil.which(name, path=path))
    return packages, programs


def said(output: str) -> str:
    """The line of setup.py that pip shows with -v; empty where a library was built."""
    lines = set(re.findall(r"moe_fast: no native library, pure Python only: ([^;(]+)", output))
    return ", ".join(line.strip().rstrip(".") for line in lines)


def test_the_table(tmp_path, tools):
    """What the documentation says of each combination is what happens."""
    packages, programs = tools
    sdist = make_sdist(copy_sources(tmp_path / "for_sdist"), tmp_path)
    rows, pythons = [], {}
    for form, compiler, isolation, torch in product(("sdist", "checkout"), *[(True, False)] * 3):
        folder = tmp_path / f"{form}-{compiler:d}{isolation:d}{torch:d}"
        folder.mkdir()
        python = make_environment(folder / "env", *(SITE_PACKAGES if torch else [packages]))
        what = sdist if form == "sdist" else copy_sources(folder / "source")
        path = [str(programs), *([os.environ["PATH"]] if compiler else [])]
        settings = dict(PATH=os.pathsep.join(path), CMAKE_ARGS=QUICK)
        options = [] if isolation else ["--no-build-isolation"]
        libraries, output = install(python, what, *options, **settings)
        assert libraries in ({"_native.so"}, set())
        if torch:
            pythons[bool(libraries)] = python, libraries
        words = ["yes" if value else "no" for value in (compiler, isolation, torch)]
        gets = "compiled" if libraries else "slow"
        rows.append("| " + " | ".join([form, *words, gets, said(output) or "-"]) + " |")
    print("\n".join(rows))
    assert "\n".join(rows) in (ROOT / "docs" / "packaging.md").read_text()
    for python, libraries in pythons.values():
        smoke(python, python.parents[1], libraries, tmp_path)


def test_the_files_of_a_release(source, tmp_path):
    """A wheel from the sdist, installed where there is no compiler; GPU's kernels with nvcc."""
    need_nvcc()
    output = run(".ci/wheel", sys.executable, tmp_path, cwd=source, CMAKE_ARGS="-DMOE_CUDA=ON")
    assert output.count("moe_fast: CPU and CUDA halves, ") == 1 and output.count("PASSED") == 2
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"moe_fast-{moe_fast.__version__}-py3-none-manylinux_2_")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"moe_fast/py.typed", "moe_fast/triton_ops/__init__.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"moe_fast", "moe_fast_cli.py"}  # no library of torch's beside it
    python = make_environment(tmp_path / "env", *SITE_PACKAGES)
    libraries, _ = install(python, wheel, "--no-index", PATH="")
    assert libraries == {"_native.so", "_native_cuda.so"}
    smoke(python, tmp_path / "env", libraries, tmp_path)
    # From the checkout's root: with -P still the installed one, without it the checkout's own.
    smoke(python, tmp_path / "env", libraries, source, "-P")
    smoke(python, source, set(), source)


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_library_of_an_earlier_build_stays_out(source, tmp_path):
    left = source / "build" / "lib" / "moe_fast"  # where a pure build collects its files
    left.mkdir(parents=True)
    for number, settings in enumerate([{"MOE_FAST_NATIVE": "0"}, {"CXX": "/no/compiler"}]):
        for name in ("_native.so", "_native_cuda.so"):
            (left / name).write_bytes(b"an earlier build's")
        python = make_environment(tmp_path / f"env{number}", *SITE_PACKAGES)
        assert install(python, source, "--no-build-isolation", **settings)[0] == set()


def test_a_compiler_that_does_not_work(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    python = make_environment(tmp_path / "env", *SITE_PACKAGES)
    settings = {"CXX": str(compiler), "CMAKE_ARGS": CPU_ONLY}
    libraries, output = install(python, source, "--no-build-isolation", **settings)
    assert libraries == set() and said(output).startswith("the build failed, see above")
    with pytest.raises(AssertionError, match="MOE_FAST_NATIVE=1, but the build failed"):
        install(python, source, "--no-build-isolation", MOE_FAST_NATIVE="1", **settings)


def test_cuda_sources_that_do_not_compile(source, tmp_path):
    """The CPU half is built all the same."""
    need_nvcc()
    with (source / "kernels" / "csrc" / "cuda" / "device.cuh").open("a") as header:
        header.write("#error broken\n")
    cuda = "-DMOE_CUDA_ARCHITECTURES=80 -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    python = make_environment(tmp_path / "env", *SITE_PACKAGES)
    libraries, output = install(python, source, "--no-build-isolation", CMAKE_ARGS=cuda)
    reason = "the GPU's kernels failed to build, see above"
    assert libraries == {"_native.so"}
    assert output.count(f"moe_fast: CPU half only: {reason}") == 1
    # The CPU half is in the build folder by now.
    with pytest.raises(AssertionError, match=f"MOE_FAST_NATIVE=1, but {reason}"):
        settings = dict(MOE_FAST_NATIVE="1", CMAKE_ARGS=cuda)
        install(python, source, "--no-build-isolation", **settings)


def test_editable_install(source, tmp_path):
    def build(libraries: set[str], **environment: str) -> Path:
        name = "env-" + "-".join(environment.values())
        python = make_environment(tmp_path / name.replace("/", ""), *SITE_PACKAGES)
        install(python, source, "--no-build-isolation", "-e", CMAKE_ARGS=QUICK, **environment)
        assert {path.name for path in (source / "moe_fast").glob("*.so")} == libraries
        return python

    python = build({"_native.so"}, MOE_FAST_NATIVE="1")
    smoke(python, source, {"_native.so"}, tmp_path)
    smoke(python, source, {"_native.so"}, source)
    build({"_native.so"}, CXX="/no/compiler")  # the earlier one is kept
    build(set(), MOE_FAST_NATIVE="0")


def test_a_checkout_does_not_shadow_other_packages():
    # The root first on sys.path, as with `python -m` or PYTHONPATH.
    code = "import moe_fast, moe_fast.triton_ops; from transformers import BertModel; print('fine')"
    assert "fine" in run(sys.executable, "-c", code, cwd=ROOT)


def need_nvcc() -> None:
    """Skip without nvcc; with ``CI=true`` that is a failure."""
    setup_py = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_py")
    if os.environ.get("CUDACXX") or shutil.which("nvcc") or setup_py["cuda_environment"]():
        return
    if os.environ.get("CI") == "true":
        pytest.fail("CI needs nvcc: pip install '.[cuda-build]'", pytrace=False)
    pytest.skip("nvcc was not found: pip install -e '.[cuda-build]'")
