"""Tuning tables: the format, the keys, which file is read and which is written."""

from __future__ import annotations

import json

import pytest
import torch

from tests.ops.helpers import assert_says

pytest.importorskip("triton", reason="triton is not installed")

from moe_fast.triton_ops import launch_config
from moe_fast.triton_ops import tuning_tables as t
from moe_fast.triton_ops.config import Config, why_not

KEY = "up/n3072/k768/rows8192/bfloat16"
TABLE = {KEY: Config(64, 256, 64, 8, 3, 4)}


SHIPPED = t.SHIPPED_TABLES
GPUS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Shipped and own tables in folders of the test's."""
    monkeypatch.setattr(t, "SHIPPED_TABLES", tmp_path / "shipped")
    monkeypatch.setenv(t.OWN_TABLES, str(tmp_path / "own"))
    t.load_table.cache_clear()
    yield
    t.load_table.cache_clear()


def test_a_table_is_read_as_it_was_written():
    text = t.format_table("NVIDIA H200", TABLE)
    assert t.parse_table(text, "h200.json") == TABLE
    assert json.loads(text)["gpu"] == "NVIDIA H200"


def test_keys_bucket_the_rows_alone():
    key = t.table_key("up", 3072, 768, 5000, torch.bfloat16)
    assert key == t.table_key("up", 3072, 768, 8192, torch.bfloat16) == next(iter(TABLE))
    assert key != t.table_key("up", 3072, 768, 8193, torch.bfloat16)
    assert key != t.table_key("up", 3072, 768, 5000, torch.float16)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", ["t.json", "JSON"]),
        ("[]", ["t.json", "configs"]),
        ('{"configs": {"up": {"block_m": 17}}}', ["t.json", "'up'", "block_m", 17]),
        ('{"configs": {"up": {"warps": 4}}}', ["t.json", "'up'", "warps"]),
    ],
)
def test_a_broken_table_names_file_and_entry(text, says):
    with pytest.raises(ValueError) as error:
        t.parse_table(text, "t.json")
    assert_says(error, *says)


def test_own_entries_come_before_shipped_ones(tmp_path, monkeypatch):
    other = {**TABLE, "up/n1/k1/rows1/float32": Config()}
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "A_GPU.json").write_text(t.format_table("A GPU", other))
    assert t.load_table("A GPU") == other
    mine = {KEY: Config(32, 32, 32)}
    assert t.add_to_table("A GPU", mine) == tmp_path / "own" / "A_GPU.json"
    assert t.load_table("A GPU") == other | mine
    assert t.load_table("B GPU") == {}
    monkeypatch.delenv(t.OWN_TABLES)
    t.load_table.cache_clear()
    assert t.load_table("A GPU") == other


def test_adding_keeps_the_other_entries(tmp_path):
    t.add_to_table("A GPU", TABLE)
    t.add_to_table("A GPU", {"up/n1/k1/rows1/float32": Config()})
    assert t.load_table("A GPU") == TABLE | {"up/n1/k1/rows1/float32": Config()}
    assert [p.name for p in (tmp_path / "own").iterdir()] == ["A_GPU.json"]


def test_a_broken_own_table_is_not_overwritten(tmp_path):
    path = tmp_path / "own" / "A_GPU.json"
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(ValueError, match="A_GPU.json"):
        t.add_to_table("A GPU", TABLE)
    assert path.read_text() == "{"


def test_lookup_takes_the_table_s_entry_else_the_heuristic_s(monkeypatch):
    monkeypatch.setattr(launch_config, "gpu_name", lambda device: "A GPU")
    monkeypatch.setattr(launch_config, "target_of", lambda index: "sm_90")
    t.add_to_table("A GPU", TABLE)
    like = torch.empty(0, dtype=torch.bfloat16)
    assert launch_config.config_for("up", like, 3072, 768, 5000) == TABLE[KEY]
    heuristic = launch_config.heuristic("up", torch.bfloat16, "sm_90", 3072, 768)
    assert launch_config.config_for("up", like, 3072, 768, 9000) == heuristic != TABLE[KEY]


def test_an_entry_too_large_for_the_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(launch_config, "gpu_name", lambda device: "A GPU")
    monkeypatch.setattr(launch_config, "target_of", lambda index: "sm_80")
    t.add_to_table("A GPU", {KEY: Config(256, 256, 128, 8, 4)})
    with pytest.raises(ValueError) as error:
        launch_config.config_for("up", torch.empty(0, dtype=torch.bfloat16), 3072, 768, 8192)
    assert_says(error, "A GPU", KEY, 3 * 128 * 512 * 2, 166_912)  # three buffers of four stages


def test_an_entry_for_grouped_mm_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(launch_config, "gpu_name", lambda device: "A GPU")
    monkeypatch.setattr(launch_config, "target_of", lambda index: "sm_80")
    key = t.table_key("linear", 768, 3072, 8192, torch.bfloat16)
    t.add_to_table("A GPU", {key: Config(implementation="grouped_mm")})
    with pytest.raises(ValueError) as error:
        launch_config.config_for("linear", torch.empty(0, dtype=torch.bfloat16), 768, 3072, 8192)
    assert_says(error, "A GPU", key, "sm_90", "sm_80")


def test_entries_on_trial_come_first_and_go(tmp_path):
    t.add_to_table("A GPU", TABLE)
    with t.in_use("A GPU", {KEY: Config(32, 32, 32)}):
        assert t.load_table("A GPU") == {KEY: Config(32, 32, 32)}
        assert t.load_table("B GPU") == {}
    assert t.load_table("A GPU") == TABLE


@pytest.mark.parametrize("gpu", GPUS)
def test_shipped_tables_fit_their_gpu_and_say_that_they_are_not_measured(gpu, monkeypatch):
    monkeypatch.setattr(t, "SHIPPED_TABLES", SHIPPED)
    path = t.table_paths(gpu)[0]
    table = json.loads(path.read_text())
    assert table["gpu"] == gpu and table["measured"] is False and "Not measured" in table["why"]
    configs = t.load_table(gpu)
    assert len(configs) == len(table["configs"]) > 20
    for key, config in configs.items():
        kernel, n, k, rows, dtype = key.split("/")
        sizes = [int(part.lstrip("nkrows")) for part in (n, k, rows)]
        assert key == t.table_key(kernel, *sizes, getattr(torch, dtype))
        assert why_not(config, kernel, getattr(torch, dtype), "sm_90", *sizes[:2]) is None


def test_shipped_tables_name_both_weight_gradients_of_bert(monkeypatch):
    """D = 768, H = 3072, 8,192 rows per expert or, padded, 127 more: dW2 [D, H] and dW1 [H, D]."""
    monkeypatch.setattr(t, "SHIPPED_TABLES", SHIPPED)
    for gpu in GPUS:
        for n, k in ((3072, 768), (768, 3072)):
            for rows in (8192, 8192 + 127):
                key = t.table_key("grad_weight", n, k, rows, torch.bfloat16)
                assert t.load_table(gpu)[key].implementation == "grouped_mm"


def test_no_other_table_ships():
    assert {p.stem.replace("_", " ") for p in SHIPPED.iterdir()} == set(GPUS)
