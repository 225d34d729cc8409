"""Compiled ahead of time for GPUs that are not here: no spills, tensor cores, shared memory."""

from __future__ import annotations

import json
import re

import pytest
import torch

from bench import triton_resources as resources

from .processes import ROOT, needs_triton

NAMES = ("up", "linear", "grad_hidden", "grad_weight", "add_product", "info_nce")
PRODUCTS = (
    r"^(up|linear|persistent_linear|grad_hidden|grad_weight|add_product)_kernel"
    r"|^info_nce\w* .*TEXTS=False"
)
# Of these one or two of each kernel.
A_FEW = (
    r"^up_kernel .*ACT=gelu GATED=False .*STORE_Z=True STORE_H=True .*(PADDED|DESCRIPTORS)=True"
    r"|^linear_kernel .*WEIGHTED=True .*DESCRIPTORS=True|^persistent_linear.*WEIGHTED=True"
    r"|^grad_hidden_kernel .*GATED=False .*PADDED=True|^grad_weight_kernel .*PADDED=True"
    r"|^add_product_kernel .*bf16"
    r"|^info_nce\w* COSINE=True .*TEXTS=False .*bf16"
)
TABLE = ROOT / "docs" / "kernels-resources.json"


@pytest.fixture(autouse=True)
def compiled_here(monkeypatch, tmp_path) -> None:
    """Nothing comes from an earlier run's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def committed(target: str) -> dict[str, dict]:
    """The table's rows, if this is its Triton; another one's registers and spills differ."""
    import triton

    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is Triton {table['triton']}'s, here is {triton.__version__}")
    return table["resources"][target]


@needs_triton
@pytest.mark.parametrize(
    ("target", "which"),
    [
        ("sm_90", A_FEW),
        pytest.param("sm_90", PRODUCTS, marks=pytest.mark.slow),
        pytest.param("gfx942", PRODUCTS, marks=pytest.mark.slow),
    ],
    ids=["a few for sm_90", "sm_90", "gfx942"],
)
def test_bert_base_in_bfloat16(target, which):
    """Every product uses the tensor cores, spills nothing in its loop, and is as in the table."""
    table, wrong = resources.measure([target], ["bfloat16"], which)
    kernels = table[target]
    assert not wrong
    for name in NAMES:
        assert sum(k.startswith(name) for k in kernels) >= (2 if which == PRODUCTS else 1), name
    assert all(used["tensor_cores"] and used["registers"] > 32 for used in kernels.values())
    copied = {k for k in kernels if kernels[k]["tile_copies"]}
    persistent = {k for k in kernels if k.startswith("persistent_linear")}
    assert copied == {k for k in kernels if "DESCRIPTORS=True" in k} | persistent
    assert len(copied) == (0 if target == "gfx942" else 8 if which == PRODUCTS else 3)
    assert persistent == {k for k in kernels if kernels[k].get("specialized")}
    sorted_rows = [k for k in kernels if re.match(r"grad_weight.*PADDED=True", k)]
    assert bool(sorted_rows) == (target == "sm_90")
    # All stages of the pipeline are buffers, where no index is loaded first.
    assert all(kernels[k]["buffers"] == 4 for k in sorted_rows)
    assert kernels.items() <= committed(target).items()


@needs_triton
def test_a_configuration_too_large_is_found():
    from moe_fast.triton_ops.config import Config
    from moe_fast.triton_ops.up_projection import up_projection

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with resources.recorded("sm_90") as launches:
        up_projection(
            *(new(4096, 768), new(8, 3072, 768), None),
            *(new(9, dtype=torch.int64), new(4096, dtype=torch.int64)),
            **dict(act="gelu", gated=False, want_z=True, want_h=True),
            config=Config(128, 256, 128, 4, 3),
        )
    used = resources.compile_launch(launches[0], "sm_90")
    found = " ".join(resources.faults(launches[0], "sm_90", used))
    assert "spills" in found and "shared memory" in found


@needs_triton
@pytest.mark.parametrize("gathered", [True, False])
def test_the_memory_of_a_configuration_is_what_it_compiles_to(gathered):
    from moe_fast.triton_ops.config import Config, memory_of, why_not
    from moe_fast.triton_ops.grad_weight import grad_weight

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    config = Config(128, 256, 64, 8, 5)
    index = new(4096, dtype=torch.int64)
    with resources.recorded("sm_90") as launches:
        grad_weight(
            *(new(4096, 768), new(4096, 3072), None, (new(9, dtype=torch.int64), index, index)),
            **dict(gather_a=gathered, gather_b=False, padded=not gathered, config=config),
        )
    used = resources.compile_launch(launches[0], "sm_90").shared_memory
    assert used == memory_of(config, "grad_weight", torch.bfloat16, "sm_90", gathered)
    assert used == (148_480 if gathered else 245_760)
    reason = why_not(config, "grad_weight", torch.bfloat16, "sm_90", 3072, 768, gathered)
    assert (reason is None) == gathered


@needs_triton
def test_own_logits_are_computed_in_tiles_of_the_size_that_ranks_compare_with():
    with resources.recorded("sm_90") as launches:
        for form in ("symmetric", "one way", "masks", "everything"):
            resources._info_nce(resources.PROBLEMS["bfloat16"], form)

    def tiles(name: str) -> set[tuple]:
        found = [dict(one.constants) for one in launches if one.kernel.__name__ == name]
        return {tuple(c[n] for n in ("BM", "BN", "BK", "COSINE", "ACC")) for c in found}

    assert (
        tiles("own_logits_kernel") == tiles("info_nce_kernel")
        and len(tiles("info_nce_kernel")) >= 4
    )


def test_the_committed_table_has_every_target_and_no_spills_in_a_main_loop():
    table = json.loads(TABLE.read_text())["resources"]
    assert set(table) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for kernels in table.values():
        assert len(kernels) > 100
        assert not any(used.get("loop_spills") for used in kernels.values())
        spilling = {name: used["spills"] for name, used in kernels.items() if used["spills"]}
        assert all("maxnreg=" in name and spills <= 64 for name, spills in spilling.items())


def test_the_page_names_the_registers_of_tiles_of_64_rows():
    """Those of the heuristic for few rows per expert, on sm_90, in 16 bits."""
    found = [
        used["registers"]
        for name, used in json.loads(TABLE.read_text())["resources"]["sm_90"].items()
        if re.match(
            r"(up|linear|grad_hidden)_kernel .*EVEN_K=True .*BM=64 .*num_warps=8 \*bf16", name
        )
    ]
    page = (ROOT / "docs" / "kernels.md").read_text()
    says = re.search(r"need (\d+) at most on\s+sm_90", page)
    assert len(found) > 10 and says and int(says[1]) == max(found)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_a_sample_of_the_committed_table(target):
    """Of all problems and kernels; ``test_whole_table.py`` compiles all of them."""
    table, wrong = resources.measure([target], list(resources.PROBLEMS), every=25)
    assert not wrong
    assert len(table[target]) > 10
    assert table[target].items() <= committed(target).items()
