"""torch.export: a mixture's program, for other numbers of texts and tokens, gives the same."""

import pytest
import torch

from tests.layers.test_attention import padded
from tests.models.encoder_table import mixture
from tests.models.tiny import CLS, relative_error

pytestmark = pytest.mark.slow  # an export takes seconds


class States(torch.nn.Module):
    """A mixture as a function of tensors."""

    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, input_ids, attention_mask, domain_ids=None):
        options = {} if domain_ids is None else {"domain_ids": domain_ids}
        return self.moe(input_ids=input_ids, attention_mask=attention_mask, **options)[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {"routing": "token_topk", "num_experts_per_tok": 2}),
        ("bert", {"routing": "sentence_topk", "num_experts_per_tok": 2}),
        ("bert", {"routing": "enforced", "domains": ["a", "b", "c"], "cls_token_id": CLS}),
        ("modernbert", {"routing": "token_topk", "num_experts_per_tok": 2}),
        ("xlm_roberta", {"routing": "dense"}),
    ],
)
def test_the_program_takes_other_sizes(name, options, tmp_path):
    moe = mixture(name, layers=1, **options).float().eval()
    enforced = options["routing"] == "enforced"

    def inputs(lengths):
        batch = padded(lengths, pad=moe.config.pad_token_id)
        given = [batch["input_ids"], batch["attention_mask"]]
        return (*given, torch.arange(len(lengths)) % 3) if enforced else tuple(given)

    first = inputs([9, 5, 1, 12])
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = tuple(sizes if t.dim() == 2 else {0: torch.export.Dim.DYNAMIC} for t in first)
    with torch.no_grad():
        program = torch.export.export(States(moe), first, dynamic_shapes=shapes, strict=False)
        torch.export.save(program, tmp_path / "program.pt2")
        run = torch.export.load(tmp_path / "program.pt2").module()
        for lengths in ([9, 5, 1, 12], [3, 2], [7, 7, 20, 1, 1, 4]):
            given = inputs(lengths)
            real = given[1].bool()
            assert relative_error(run(*given)[real], States(moe)(*given)[real]) <= 1e-5
