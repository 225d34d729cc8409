"""The native half of the build; names, versions and dependencies stand in pyproject.toml.

MOE_FAST_NATIVE says what happens to the compiled library (``moe_fast/_native.so``):

- ``auto`` (default): built where torch, CMake and a C++ compiler are found, else left out, and one
  line says why, which pip shows with -v alone. moe_fast works without it, and its first slow call
  says how to build it.
- ``1``: required; whatever stops it is an error.
- ``0``: left out.

Where nvcc is found as well, on PATH, by CUDACXX or in pip's packages (the extra ``cuda-build``), a
second library, ``moe_fast/_native_cuda.so``, holds the GPU's kernels; if not, CMake says so in one
line. CMAKE_ARGS="-DMOE_CUDA=ON" makes a missing nvcc an error, OFF leaves the kernels out. Where
they do not compile the first library is kept, and one line says so; with MOE_FAST_NATIVE=1 that is
an error.

The library uses torch's stable ABI and no Python symbol, so that one file serves every Python and
every torch from 2.11 on: the wheel is tagged ``py3-none-<platform>``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY = "moe_fast._native"
CUDA_LIBRARY = "_native_cuda.so"  # beside it
OLDEST_TORCH = (2, 11)
PURE = "no native library, pure Python only"
METADATA_COMMANDS = {"egg_info", "dist_info"}  # pip runs these before the build itself


def native_mode() -> str:
    """The value of MOE_FAST_NATIVE: ``"0"``, ``"1"`` or ``"auto"``."""
    mode = os.environ.get("MOE_FAST_NATIVE", "auto").strip().lower() or "auto"
    if mode not in ("0", "1", "auto"):
        raise SystemExit(f"moe_fast: MOE_FAST_NATIVE must be 0, 1 or auto; got {mode!r}.")
    return mode


def find_program(*names: str) -> str | None:
    """The path of the first of ``names`` beside this Python (where pip puts cmake), or on PATH."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def why_not_buildable() -> str | None:
    """What is missing for a native build here; ``None`` if nothing is."""
    if sys.platform == "win32":
        return "the native library has no Windows build yet"
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return (
            f"torch cannot be imported at build time ({error}); install it first, then "
            "pip install --no-build-isolation"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    if find_program("cmake") is None:
        return "cmake was not found"
    if find_program("ninja", "make") is None:
        return "neither ninja nor make was found"
    compilers = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if find_program(*compilers) is None:
        return f"no C++ compiler was found ({', '.join(compilers)})"
    return None


def do_without(what: str, reason: str, way_out: str = "") -> None:
    """Say in one line what is left out and why, or stop where the library is required."""
    if native_mode() == "1":
        raise SystemExit(f"moe_fast: MOE_FAST_NATIVE=1, but {reason}{way_out}.")
    if METADATA_COMMANDS.isdisjoint(sys.argv):
        print(f"moe_fast: {what}: {reason}.", file=sys.stderr)


def decide_native() -> bool:
    """Whether to build the library."""
    reason = "MOE_FAST_NATIVE=0" if native_mode() == "0" else why_not_buildable()
    if reason is not None:
        do_without(PURE, reason)
    return reason is None


def cuda_environment() -> dict[str, str]:
    """What leads CMake to an nvcc that only pip's packages have; empty if it is found anyway."""
    if os.environ.get("CUDACXX") or shutil.which("nvcc"):
        return {}
    spec = importlib.util.find_spec("nvidia")
    folders = (spec.submodule_search_locations or []) if spec else []
    toolkits = [nvcc.parent.parent for f in folders for nvcc in Path(f).glob("cu*/bin/nvcc")]
    if not toolkits:
        return {}
    newest = max(toolkits)
    # The packages call the folder lib, and nvcc looks in lib64.
    libraries = [str(newest / "lib"), *filter(None, [os.environ.get("LIBRARY_PATH")])]
    return {"CUDACXX": str(newest / "bin" / "nvcc"), "LIBRARY_PATH": os.pathsep.join(libraries)}


def cmake_configure(build_dir: Path, output_dir: Path) -> None:
    """Prepare a build of the libraries into ``output_dir``. Raises CalledProcessError."""
    from torch.utils import cpp_extension

    cmake = find_program("cmake")
    ninja = find_program("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": sys.executable,
        "MOE_TORCH_INCLUDE": ";".join(cpp_extension.include_paths()),
        "MOE_TORCH_LIB": cpp_extension.library_paths()[0],
        "MOE_OUTPUT_DIR": str(output_dir),
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), *generator]
    configure += [f"-D{name}={value}" for name, value in definitions.items()]
    cmake_args = os.environ.get("CMAKE_ARGS", "").split()
    subprocess.run([*configure, *cmake_args], check=True, env=os.environ | cuda_environment())


def cmake_build(build_dir: Path, target: str) -> None:
    """Build one target of what was configured. Raises CalledProcessError."""
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    build = [find_program("cmake"), "--build", str(build_dir), "--parallel", jobs]
    subprocess.run([*build, "--target", target], check=True, env=os.environ | cuda_environment())


class BuildNative(build_ext):
    """Hands the one extension to CMake instead of to setuptools' compiler."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = output.with_name(CUDA_LIBRARY)
        cuda.unlink(missing_ok=True)  # one of an earlier build, which this one may not make
        build_dir = Path(self.build_temp).resolve()
        try:
            cmake_configure(build_dir, output.parent)
            cmake_build(build_dir, output.stem)
        except (subprocess.CalledProcessError, OSError) as error:
            # An older library must not be packed in the place of the one that failed.
            output.unlink(missing_ok=True)
            do_without(PURE, f"the build failed, see above ({error})")
            return
        try:
            cmake_build(build_dir, "all")  # what is left: the GPU's kernels, where nvcc was found
        except subprocess.CalledProcessError as error:
            cuda.unlink(missing_ok=True)
            reason = f"the GPU's kernels failed to build, see above ({error})"
            way_out = '; CMAKE_ARGS="-DMOE_CUDA=OFF" leaves them out'
            do_without("CPU half only", reason, way_out)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # without a tag: any Python loads it

    def copy_extensions_to_source(self) -> None:
        """Editable installs: put what the build made beside the sources."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("moe_fast"))
        for name in (Path(self.get_ext_filename(LIBRARY)).name, CUDA_LIBRARY):
            built = Path(self.build_lib, "moe_fast", name)
            if built.exists():
                self.copy_file(str(built), str(package / name))
            else:
                (package / name).unlink(missing_ok=True)


class BuildPython(build_py):
    """Keeps a library of an earlier build out of an install that is without.

    An editable install loses the one beside its sources only where it was asked to be without.
    """

    def run(self) -> None:
        super().run()
        folders = [] if self.distribution.ext_modules else [Path(self.build_lib, "moe_fast")]
        if self.editable_mode and native_mode() == "0":
            folders.append(ROOT / "moe_fast")
        for folder in folders:
            for library in folder.glob("_native*.so"):
                library.unlink()


class PlatformWheel(bdist_wheel):
    """Tags a wheel with a library for its platform, but for any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


def main() -> None:
    native = decide_native()
    triton_ops = find_packages("kernels/triton_ops")
    setup(
        packages=[
            *find_packages(include=["moe_fast", "moe_fast.*"]),
            "moe_fast.bench",  # `moe-fast bench`
            "moe_fast.triton_ops",
            *(f"moe_fast.triton_ops.{name}" for name in triton_ops),
        ],
        py_modules=["moe_fast_cli"],  # what the program `moe-fast` runs
        package_dir={
            "moe_fast": "moe_fast",
            "moe_fast.bench": "bench",
            "moe_fast.triton_ops": "kernels/triton_ops",
        },
        ext_modules=[Extension(LIBRARY, sources=[])] if native else [],
        cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "bdist_wheel": PlatformWheel},
    )


if __name__ == "__main__":
    main()
