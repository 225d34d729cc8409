"""experts_implementation="moe_fast" on every architecture of transformers that has the switch."""

import pytest

from tests.integrations import moe_models

NAMES = moe_models.architectures()
# One of each kind; the others are many models for the same code.
FIRST = ("aria", "gpt_oss", "nemotron_h", "openai_privacy_filter", "qwen3_moe")
UNSWITCHED = ("dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FIRST else [pytest.mark.slow]) for n in NAMES]
)
def test_the_table_says_what_each_model_does(name):
    """Equal to eager in output and gradients; ``python -m tests.integrations.moe_models`` writes
    the table of docs/transformers.md anew."""
    assert moe_models.row(name) == moe_models.table_of_the_page()[name]


def test_the_table_has_every_architecture():
    """Those of the newest transformers; an older one has fewer."""
    assert set(NAMES) <= set(moe_models.table_of_the_page())


def test_the_page_names_those_without_a_switch():
    text = moe_models.PAGE.read_text(encoding="utf-8")
    for name in (*UNSWITCHED, "switch_transformers"):
        assert f"`{name}`" in text and name not in NAMES
