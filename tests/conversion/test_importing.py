"""import_checkpoint: foreign names and lists of experts, checked against models that use them."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import moe_fast
from moe_fast.conversion import KeyRule
from tests.models.tiny import build, relative_error, same_weights

E, H, D = 3, 48, 32


def randomize(model):
    """Every weight at random, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def output(model, batch, **options):
    return model(**batch, **options).last_hidden_state[batch["attention_mask"].bool()]


class TopKOfLinear(nn.Module):
    """A list of linear maps, mixed by the softmax over the K largest of a gate's logits."""

    def __init__(self, inputs, outputs, top_k):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(E))
        self.gate = nn.Linear(inputs, E, bias=False)
        self.top_k = top_k

    def forward(self, x):
        logits, chosen = self.gate(x).topk(self.top_k, dim=-1)
        weights = logits.softmax(-1)
        each = torch.stack([expert(x) for expert in self.experts], dim=-2)
        index = chosen[..., None].expand(*chosen.shape, each.shape[-1])
        return (weights[..., None] * each.gather(-2, index)).sum(-2)


@pytest.mark.parametrize("target", ["intermediate", "output"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_yu(batch, target, top_k, prefix):
    dense = build("xlm_roberta").double()
    like = moe_fast.upcycle(
        dense, num_experts=E, num_experts_per_tok=top_k, target=target, weight_mode="renormalize"
    )
    for layer in dense.encoder.layer:
        block = layer.intermediate if target == "intermediate" else layer.output
        block.dense = TopKOfLinear(block.dense.in_features, block.dense.out_features, top_k)
    theirs = randomize(dense.double())
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    ours = moe_fast.import_checkpoint(state, like, style="yu")
    assert relative_error(output(ours, batch), output(theirs, batch)) <= 1e-12


class ByDomain(nn.Module):
    """A list of dense MLPs, the same one for the whole batch."""

    def __init__(self, mlps):
        super().__init__()
        self.experts = nn.ModuleList(mlps)
        self.chosen = 0

    def forward(self, x):
        return self.experts[self.chosen](x)


def test_hallee_modernbert(batch):
    dense = build("modernbert").double()
    like = moe_fast.upcycle(dense, num_experts=E, routing="enforced")
    for layer in dense.layers:
        layer.mlp = ByDomain([type(layer.mlp)(dense.config).double() for _ in range(E)])
    theirs = randomize(dense)
    state = {f"bert.{name}": value for name, value in theirs.state_dict().items()}
    state |= {f"pooler.{name}": torch.zeros(2) for name in ("w1.weight", "layernorm.bias")}
    ours = moe_fast.import_checkpoint(state, like, style="hallee_modernbert")
    for expert in range(E):
        for layer in theirs.layers:
            layer.mlp.chosen = expert
        got = output(ours, batch, expert_ids=torch.full((3,), expert))
        assert relative_error(got, output(theirs, batch)) <= 1e-12


def transformers_model():
    """A ModernBERT whose MLPs are transformers' own mixture."""
    dense = build("modernbert").double()
    like = moe_fast.upcycle(dense, num_experts=E, num_experts_per_tok=2)
    config = MixtralConfig(
        hidden_size=D,
        intermediate_size=H,
        num_local_experts=E,
        num_experts_per_tok=2,
        hidden_act="gelu",
    )
    config._experts_implementation = "eager"
    for layer in dense.layers:
        layer.mlp = MixtralSparseMoeBlock(config).double()
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter)
    return randomize(dense), like


def test_transformers(batch):
    theirs, like = transformers_model()
    ours = moe_fast.import_checkpoint(theirs.state_dict(), like, style="transformers")
    assert relative_error(output(ours, batch), output(theirs, batch)) <= 1e-6  # softmax in float32


@pytest.mark.parametrize(
    ("style", "block", "names"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_transformers_lists(style, block, names):
    theirs, like = transformers_model()
    state = {}
    for name, value in theirs.state_dict().items():
        layer, _, leaf = name.partition(".mlp.")
        for expert in range(E):
            start = f"model.{layer}.{block}.experts.{expert}"
            if leaf == "experts.gate_up_proj":
                state[f"{start}.{names[0]}.weight"] = value[expert, :H]
                state[f"{start}.{names[1]}.weight"] = value[expert, H:]
            elif leaf == "experts.down_proj":
                state[f"{start}.{names[2]}.weight"] = value[expert]
        if leaf == "gate.weight":
            state[f"model.{layer}.{block}.gate.weight"] = value
        elif not leaf:
            state[f"model.{name}"] = value
    got = moe_fast.import_checkpoint(state, like, style=style)
    want = moe_fast.import_checkpoint(theirs.state_dict(), like, style="transformers")
    assert same_weights(got, want)


def hallee_bert_state(moe):
    """The names of the older code, one middle layer with experts, for a mixture's weights."""
    state = {}
    for name, value in moe.state_dict().items():
        layer, _, leaf = name.partition(".mlp.")
        theirs = {"up_proj": "intermediate_up.weight", "up_proj_bias": "intermediate_up.bias"}
        theirs |= {"down_proj": "intermediate_down.weight"}
        theirs |= {"down_proj_bias": "intermediate_down.bias"}
        if leaf in theirs:
            for expert in range(E):
                start = f"bert.{layer}.moe_block.experts.{expert}"
                state[f"{start}.{theirs[leaf]}"] = value[expert]
                state[f"{start}.new_linear.weight"] = torch.zeros(H, D)
                state[f"{start}.new_linear.bias"] = torch.ones(H)
        elif leaf == "router.weight":
            state[f"bert.{layer}.moe_block.gate.weight"] = value
        elif name.startswith("encoder.layer.1.output.LayerNorm"):
            state[f"bert.encoder.layer.1.LayerNorm.{name.rpartition('.')[2]}"] = value
        else:
            state[f"bert.{name}"] = value
    return {**state, "temp": torch.tensor(0.7)}


def test_hallee_bert(bert, caplog):
    like = moe_fast.upcycle(bert, num_experts=E, layers="single")
    want = randomize(moe_fast.upcycle(bert, num_experts=E, layers="single", seed=1))
    with caplog.at_level(logging.WARNING):
        got = moe_fast.import_checkpoint(hallee_bert_state(want), like, style="hallee_bert")
    assert same_weights(got, want)
    assert "outputs differ" in caplog.text
    state = hallee_bert_state(want)
    trained = "bert.encoder.layer.1.moe_block.experts.2.new_linear.weight"
    state[trained] = torch.full((H, D), 0.1)
    with pytest.raises(ValueError, match=f"no place for the trained: {trained}"):
        moe_fast.import_checkpoint(state, like, style="hallee_bert")


class TestRules:
    RULES = (
        KeyRule(r"up\.(?P<layer>\d)\.(?P<expert>\d)", "encoder.layer.{layer}.mlp.up_proj"),
        KeyRule(r"(?P<rest>.*)", "{rest}"),
    )

    @pytest.fixture
    def want(self, bert):
        return randomize(moe_fast.upcycle(bert, num_experts=2, layers=[1]))

    @pytest.fixture
    def state(self, want):
        state = dict(want.state_dict())
        stacked = state.pop("encoder.layer.1.mlp.up_proj")
        return {**state, "up.1.0": stacked[0], "up.1.1": stacked[1]}

    @pytest.fixture
    def like(self, bert):
        return moe_fast.upcycle(bert, num_experts=2, layers=[1], trainable="experts").eval()

    def test_own_rules(self, state, want, like):
        before = {name: value.clone() for name, value in like.state_dict().items()}
        got = moe_fast.import_checkpoint(state, like, style=self.RULES)
        assert same_weights(got, want) and got.config.to_dict() == like.config.to_dict()
        assert all(torch.equal(value, before[name]) for name, value in like.state_dict().items())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"up.1.1": None}, r"the checkpoint lacks: encoder\.layer\.1\.mlp\.up_proj\[1\]"),
            ({"pooler.dense.bias": None}, r"the checkpoint lacks: pooler\.dense\.bias"),
            ({"up.1.2": torch.ones(H, D)}, r"too few experts for: up\.1\.2 -> .*up_proj\[2\] of 2"),
            ({"up.1.1": torch.ones(D, H)}, r"shapes differ: up\.1\.1 \[32, 48\] -> .*\[48, 32\]"),
            ({"strange": torch.ones(1)}, "the model has no: strange -> strange"),
            (
                {"encoder.layer.1.mlp.up_proj": torch.ones(2, H, D)},
                r"given twice: (up\.1\.0 -> .*, up|encoder\.layer\.1\.mlp\.up_proj)",
            ),
            (
                {"pooler.dense.bias": torch.ones(D, dtype=torch.float64)},
                r"dtype cannot hold: pooler\.dense\.bias \(torch\.float64 -> torch\.float32\)",
            ),
            (
                {"pooler.dense.bias": torch.ones(D, dtype=torch.int8)},
                r"dtype cannot hold: pooler\.dense\.bias \(torch\.int8 -> torch\.float32\)",
            ),
        ],
    )
    def test_what_does_not_fit_is_listed(self, state, like, changes, message):
        state = {k: v for k, v in {**state, **changes}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            moe_fast.import_checkpoint(state, like, style=self.RULES)

    def test_names_that_no_rule_reads_are_listed(self, state, like):
        with pytest.raises(ValueError, match=r"no rule reads: embeddings.* and \d+ more"):
            moe_fast.import_checkpoint(state, like, style=self.RULES[:1])

    def test_a_smaller_dtype_is_widened_without_loss(self, state, want, like):
        state["pooler.dense.bias"] = state["pooler.dense.bias"].bfloat16()
        got = moe_fast.import_checkpoint(state, like, style=self.RULES)
        assert torch.equal(got.pooler.dense.bias, state["pooler.dense.bias"].float())

    def test_bad_rules(self, like):
        for rule in (KeyRule("(", None), KeyRule("x", "{layer}"), KeyRule("x", "x", half=2)):
            with pytest.raises(ValueError, match="style: "):
                moe_fast.import_checkpoint({}, like, style=[rule])

    def test_arguments(self, bert, like):
        with pytest.raises(ValueError, match="style.*must be one of 'hallee_bert'"):
            moe_fast.import_checkpoint({}, like, style="other")
        with pytest.raises(TypeError, match="like must be a mixture of experts; got BertModel"):
            moe_fast.import_checkpoint({}, bert, style="yu")


class TestFiles:
    @pytest.fixture
    def like(self):
        return moe_fast.upcycle(build("modernbert"), num_experts=E, routing="enforced")

    def test_a_file_a_folder_and_shards(self, like, tmp_path):
        rule = [KeyRule("(?P<rest>.*)", "{rest}")]
        want = randomize(moe_fast.upcycle(build("modernbert"), num_experts=E, routing="enforced"))
        want.save_pretrained(tmp_path / "whole")
        want.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
        for place in ("whole/model.safetensors", "whole", "shards"):
            got = moe_fast.import_checkpoint(str(tmp_path / place), like, style=rule)
            assert same_weights(got, want), place

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pt"])
    def test_pickles_are_refused(self, like, tmp_path, name):
        torch.save({}, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} may hold a pickle.*save_file"):
            moe_fast.import_checkpoint(tmp_path / name, like, style="yu")
        if name == "pytorch_model.bin":
            (tmp_path / "config.json").write_text("{}")
            with pytest.raises(ValueError, match="may hold a pickle"):
                moe_fast.import_checkpoint(tmp_path, like, style="yu")

    def test_what_is_not_there_or_damaged(self, like, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
            moe_fast.import_checkpoint(tmp_path / "nowhere", like, style="yu")
        with pytest.raises(FileNotFoundError, match="has no config.json"):
            moe_fast.import_checkpoint(tmp_path, like, style="yu")
        file = tmp_path / "half.safetensors"
        save_file({"x": torch.ones(100)}, file)
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(ValueError, match=r"half\.safetensors is damaged or half-written"):
            moe_fast.import_checkpoint(file, like, style="yu")
