"""Folders and dataset ids; files are the business of test_rows.py. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="needs the extra moe-fast[train]")
import datasets

from moe_fast.data import read_pairs
from moe_fast.data.sources import split_domain
from tests.data.files import write, write_jsonl, write_parquet

TRAIN = [{"a": f"a{i}", "b": f"b{i}", "label": i % 2} for i in range(5)]
TEST = [{"a": "c", "b": "d", "label": 1}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder as a dataset repository of the hub is laid out."""
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", TRAIN)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", TEST)
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_laid_out_as_a_repository(repository: Path, streaming: bool):
    assert list(read_pairs(repository, streaming=streaming)) == TRAIN
    assert list(read_pairs(str(repository), split="test", streaming=streaming)) == TEST


def test_a_configuration_of_a_repository(tmp_path: Path):
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("one", "two")
    )
    write(tmp_path / "r" / "README.md", card + "---\n")
    write_jsonl(tmp_path / "r" / "one.jsonl", TRAIN)
    write_jsonl(tmp_path / "r" / "two.jsonl", TEST)
    assert read_pairs(tmp_path / "r", name="two").to_list() == TEST
    with pytest.raises(ValueError, match=r"'one', 'two'"):
        read_pairs(tmp_path / "r")


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_written_by_save_to_disk(tmp_path: Path, streaming: bool):
    train, test = datasets.Dataset.from_list(TRAIN), datasets.Dataset.from_list(TEST)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert list(read_pairs(tmp_path / "one", streaming=streaming)) == TRAIN
    assert list(read_pairs(tmp_path / "two", split="test", streaming=streaming)) == TEST


def test_an_unknown_split_lists_those_present(tmp_path: Path, repository: Path):
    train, test = datasets.Dataset.from_list(TRAIN), datasets.Dataset.from_list(TEST)
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"no split 'dev'; splits present: \['test', 'train'\]"):
        read_pairs(tmp_path / "two", split="dev")
    with pytest.raises(ValueError, match=r"Unknown split .dev.*'train', 'test'"):
        read_pairs(repository, split="dev")
    with pytest.raises(ValueError, match="name='x': .* was saved without configurations"):
        read_pairs(tmp_path / "two", name="x")


def test_a_saved_split_is_not_taken_for_another(repository: Path, tmp_path: Path):
    datasets.load_dataset(str(repository), split="test").save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no split 'train'; splits present: \['test'\]"):
        read_pairs(tmp_path / "saved")
    assert read_pairs(tmp_path / "saved", split="test").to_list() == TEST


def test_mistakes_in_a_dataset_name_it_and_the_row(tmp_path: Path):
    rows = [*TRAIN, {"a": "x", "b": None, "label": 0}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"d, split train, row 6: b must be a string, got None"):
        read_pairs(tmp_path / "d")


def test_a_broken_file_in_a_repository(tmp_path: Path):
    write(tmp_path / "r" / "train.jsonl", '{"a": "x", "b": "y"}\n{"a": ')
    with pytest.raises(ValueError, match=r"r: not readable \(.*JSON"):
        read_pairs(tmp_path / "r")


def test_an_empty_folder(tmp_path: Path):
    (tmp_path / "r").mkdir()
    with pytest.raises(FileNotFoundError, match="is no file or folder with data here"):
        read_pairs(tmp_path / "r")


@pytest.mark.parametrize(
    "error", [datasets.exceptions.DatasetNotFoundError("not on the hub"), ConnectionError("no net")]
)
def test_an_id_goes_to_the_hub_and_its_failure_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception
):
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> None:
        asked.append((args, kwargs))
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=f"'some/pairs' is no file or .*: {error}"):
        read_pairs("some/pairs", name="all", split="dev")
    assert asked == [(("some/pairs", "all"), {"split": "dev", "streaming": False})]


def test_a_path_is_never_taken_for_an_id(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match=r"no such file: some/pairs\.jsonl"):
        read_pairs("some/pairs.jsonl")
    with pytest.raises(ValueError, match="unknown format"):
        read_pairs(Path("some/pairs"))


def test_a_domain_before_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=y.csv").touch()
    assert split_domain("x=y.csv") == (None, "x=y.csv")
    assert split_domain("law=a=b.csv") == ("law", "a=b.csv")
    assert split_domain("a.csv") == (None, "a.csv")
    assert split_domain("law=" + "x" * 5000)[0] == "law"
    with pytest.raises(ValueError, match="expected DOMAIN=FILE; the file is missing"):
        split_domain("law=")
    with pytest.raises(ValueError, match="expected DOMAIN=FILE; the domain is missing"):
        split_domain("=a.csv")


def test_a_damaged_saved_dataset_is_named(tmp_path: Path):
    datasets.Dataset.from_list(TRAIN).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("[]")
    with pytest.raises(ValueError, match=r"saved: not readable as a saved dataset"):
        read_pairs(tmp_path / "saved")
