"""The table of encoders in docs/encoders.md: what each can do, found by trying.

    python -m tests.models.encoder_table

writes it anew; tests/models/test_encoders.py compares it.
"""

import functools
import re
from pathlib import Path

import torch

import moe_fast
from moe_fast.layers import ATTENTION
from moe_fast.models.registry import architecture_of
from tests.layers.test_attention import lively, padded
from tests.models.tiny import ENCODERS, build, build_head, relative_error

PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"


@functools.cache
def dense(name, layers=2):
    """In float64, its weights of a size that makes attention far from uniform."""
    return lively(name, **{"n_layers" if name == "distilbert" else "num_hidden_layers": layers})


def mixture(name, layers=2, **settings):
    """Experts that differ, and a router that decides clearly."""
    moe = moe_fast.upcycle(dense(name, layers), num_experts=3, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for mlp in moe.moe_mlps().values():
            for parameter in mlp.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return moe


def _batch(name):
    torch.manual_seed(2)
    return padded([9, 5, 1, 12], pad=dense(name).config.pad_token_id)


def _real(model, batch, **options):
    with torch.no_grad():
        return model(**batch, **options).last_hidden_state[batch["attention_mask"].bool()]


def upcycled(name):
    """Whether a mixture gives what the dense model does."""
    batch = _batch(name)
    moe = moe_fast.upcycle(dense(name), num_experts=3)
    return _yes(relative_error(_real(moe, batch), _real(dense(name), batch)) <= 1e-12)


def packed(name):
    """Whether texts packed give what they give padded, or what the error says."""
    batch = _batch(name)
    moe = mixture(name, num_experts_per_tok=2)
    want = _real(moe, batch)
    assert relative_error(_real(moe, batch, packed=True), want) <= 1e-12, "packed where it can be"
    try:
        moe.set_attn_implementation(ATTENTION)
        return _yes(relative_error(_real(moe, batch), want) <= 1e-12)
    except ValueError as error:
        return _no(error, r"cannot be packed .*?\): (.*?)\. Give")


def fused(name):
    """Whether `fused_output` gives the same, or what the error says."""
    batch = _batch(name)
    moe = mixture(name, num_experts_per_tok=2)
    want = _real(moe, batch)
    moe.config.fused_output = True
    try:
        moe.config.check()
    except ValueError as error:
        return _no(error, r"'s layers (.*?);")
    return _yes(relative_error(_real(moe, batch), want) <= 1e-12)


def compiled(name):
    """Whether a mixture is one graph for torch.compile."""
    torch._dynamo.reset()
    batch = _batch(name)
    moe = mixture(name, layers=1)
    graph = torch.compile(moe, fullgraph=True, backend="eager")
    return _yes(relative_error(_real(graph, batch), _real(moe, batch)) <= 1e-12)


_HEADS = {
    "ForMaskedLM": "masked LM",
    "ForSequenceClassification": "texts",
    "ForTokenClassification": "tokens",
}


def headed(name):
    """The heads with which a mixture gives what the dense model does."""
    cell, there = [], architecture_of(dense(name)).heads
    batch = _batch(name)
    for head, said in _HEADS.items():
        if head not in there:
            cell.append(f"no {said}: transformers has none")
            continue
        model = build_head(name, head).double()
        moe = moe_fast.upcycle(model, num_experts=3)
        with torch.no_grad():
            got, want = (m(**batch).logits for m in (moe, model))
        if head != "ForSequenceClassification":
            got, want = (logits[batch["attention_mask"].bool()] for logits in (got, want))
        assert relative_error(got, want) <= 1e-12
        cell.append(said)
    return ", ".join(cell)


def _yes(right):
    assert right, "it runs, and gives something else"
    return "yes"


def _no(error, pattern):
    (reason,) = re.findall(pattern, str(error))
    return f"no: {reason}"


COLUMNS = {
    "upcycle": upcycled,
    "heads": headed,
    "pack": packed,
    "fused output": fused,
    "compile": compiled,
}


def row_name(name):
    """What the first column says."""
    return f"`{architecture_of(build(name)).dense_model.__name__}`"


def table_of_the_page():
    """{encoder: {column: cell}} as the page has it."""
    lines = [line.strip("|\n").split("|") for line in _lines(PAGE.read_text(encoding="utf-8"))]
    rows = [[cell.strip() for cell in line] for line in lines]
    head, _, *body = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def code_under(heading):
    """The blocks of Python under a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def _lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def main():
    """Write the table anew."""
    rows = [["encoder", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[row_name(n), *(cell(n) for cell in COLUMNS.values())] for n in ENCODERS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace("\n".join(_lines(text)), table), encoding="utf-8")


if __name__ == "__main__":
    main()
