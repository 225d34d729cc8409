"""Every encoder of the table: what its mixtures give, and what the docs say of them."""

import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, RemBertConfig, RemBertModel
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.rembert.modeling_rembert import RemBertLayer

import moe_fast
from moe_fast.architectures import ARCHITECTURES
from moe_fast.models import register_architecture
from moe_fast.models.loading import load_encoder
from moe_fast.models.registry import architecture_of
from tests.models import encoder_table
from tests.models.tiny import (
    CLS,
    DENSE,
    ENCODERS,
    NAMES,
    build,
    relative_error,
    same_weights,
    save_sentence_transformer,
)

# The others have these tests, and more, in their own files.
NEW = [name for name in ENCODERS if name not in NAMES]
DOMAINS = {"routing": "enforced", "domains": ["a", "b", "c"], "cls_token_id": CLS}


@pytest.fixture
def table():
    """The table of encoders, as it was once the test is over."""
    before = list(ARCHITECTURES)
    yield ARCHITECTURES
    ARCHITECTURES[:] = before


def test_every_entry_is_tested():
    assert {a.name for a in ARCHITECTURES} == {DENSE[name][0] for name in ENCODERS}


# K = 1 is the same products in another order of rows; with K = 2 weights sum to 1 to rounding.
@pytest.mark.parametrize(
    ("settings", "how", "tolerance"),
    [
        ({}, {}, 1e-6),
        ({"num_experts_per_tok": 2, "layers": [1]}, {}, 1e-5),
        (DOMAINS, {"domain": "b"}, 1e-6),
    ],
)
@pytest.mark.parametrize("name", NEW)
def test_upcycled_equals_dense(name, batch, settings, how, tolerance):
    dense = build(name)
    moe = moe_fast.upcycle(dense, num_experts=3, **settings)
    real = batch["attention_mask"].bool()
    options = {"output_hidden_states": True}
    with torch.no_grad():
        got = moe(**batch, **how, **options)
        want = dense(**batch, **options)
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    for g, w in zip(
        (got.last_hidden_state, *got.hidden_states),
        (want.last_hidden_state, *want.hidden_states),
        strict=True,
    ):
        assert relative_error(g[real], w[real]) <= tolerance
    if want.get("pooler_output") is not None:
        assert relative_error(got.pooler_output, want.pooler_output) <= tolerance


@pytest.mark.parametrize("settings", [{"num_experts_per_tok": 2, "layers": "alternate"}, DOMAINS])
@pytest.mark.parametrize("name", NEW)
def test_extract_gives_the_weights_back(name, settings):
    dense = build(name)
    moe = moe_fast.upcycle(dense, num_experts=3, **settings)
    back = moe_fast.extract_expert(moe, 1)
    assert type(back) is type(dense) and same_weights(back, dense)
    want, got = dense.config.to_dict(), back.config.to_dict()
    assert {k: got[k] for k in want if k != "architectures"} == {
        k: want[k] for k in want if k != "architectures"
    }


@pytest.mark.parametrize("name", NEW)
def test_joined_models_come_out_again(name):
    first, second = build(name), build(name)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    moe = moe_fast.from_experts([first, second], routing="enforced")
    parts = architecture_of(first)
    for expert, model in enumerate((first, second)):
        back, want = (m.state_dict() for m in (moe_fast.extract_expert(moe, expert), model))
        names = [
            parts.join(layer, name)
            for layer in range(3)
            for dense_names in parts.mlp_names.values()
            for name in dense_names
        ]
        own = [name for name in names if name in want]  # some have no biases
        assert len(own) >= 6 and all(torch.equal(back[name], want[name]) for name in own)


@pytest.mark.parametrize("name", NEW)
def test_save_and_load(name, batch, tmp_path):
    moe = moe_fast.upcycle(build(name), num_experts=3, num_experts_per_tok=2)
    moe.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(moe) and same_weights(loaded, moe)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, moe(**batch).last_hidden_state)
    copy = pickle.loads(pickle.dumps(moe))
    assert type(copy) is type(moe) and same_weights(copy, moe)
    fresh = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    assert 0.01 < fresh.moe_mlps()[0].down_proj.std() < 0.04  # initializer_range 0.02


@pytest.mark.parametrize("name", NEW)
def test_gradient_checkpointing(name, batch):
    moe = moe_fast.upcycle(build(name), num_experts=3, num_experts_per_tok=2).train()

    def gradients():
        moe.zero_grad()
        out = moe(**batch, output_router_logits=True)
        assert [tuple(x.shape) for x in out.router_logits] == [(27, 3)] * 3
        loss = out.last_hidden_state.pow(2).sum() + sum(x.pow(2).sum() for x in out.router_logits)
        loss.backward()
        return {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}

    plain, ran = gradients(), []
    moe.moe_mlps()[1].register_forward_pre_hook(lambda *_: ran.append(1))
    moe.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert len(ran) == 2, "the layer was not recomputed"
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("name", NEW)
def test_padding_does_not_change_a_text(name):
    moe = encoder_table.mixture(name, num_experts_per_tok=2)
    ids = torch.arange(6, 15)[None].repeat(2, 1)
    ids[:, 0] = CLS
    ids[1, 5:] = moe.config.pad_token_id
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        got = moe(ids, attention_mask=mask).last_hidden_state[1, :5]
        want = moe(ids[1:, :5], attention_mask=mask[1:, :5]).last_hidden_state[0]
    assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("name", ENCODERS)
def test_attentions_are_the_dense_models(name, batch):
    dense = build(name, attn_implementation="eager")
    moe = moe_fast.upcycle(dense, num_experts=2)
    with torch.no_grad():
        got, want = (model(**batch, output_attentions=True).attentions for model in (moe, dense))
    assert len(got) == len(want) > 0
    real = batch["attention_mask"][:, None, :, None]  # what padding looks at is not computed
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours * real, theirs * real) <= 1e-6


@pytest.mark.parametrize("name", ENCODERS)
def test_ids_and_embeddings_at_once_are_refused(name, batch):
    moe = moe_fast.upcycle(build(name), num_experts=2)
    embeddings = moe.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds; got both"):
        moe(**batch, inputs_embeds=embeddings)


@pytest.mark.parametrize("name", ["mpnet", "deberta", "deberta_v2"])
def test_own_forwards_give_attentions_and_take_embeddings(name, batch):
    """Encoders whose dense forward is written anew: what a caller may ask for is all there."""
    dense = build(name)
    moe = moe_fast.upcycle(dense, num_experts=2, layers=[0, 2])
    embeddings = dense.get_input_embeddings()(batch["input_ids"])
    inputs = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        got, want = (m(**inputs, output_attentions=True) for m in (moe, dense))
        no_mask = [m(batch["input_ids"]).last_hidden_state for m in (moe, dense)]
    assert relative_error(*no_mask) <= 1e-6
    assert len(got.attentions) == len(want.attentions) == 3
    real = batch["attention_mask"][:, None, :, None]  # what padding looks at is not computed
    for g, w in zip(got.attentions, want.attentions, strict=True):
        assert relative_error(g * real, w * real) <= 1e-6


# One of each kind of layer is compiled by default (BERT's in test_modeling.py).
SAME = ("bert", "roberta", "xlm_roberta", "camembert", "electra", "xlm_roberta_xl", "deberta")
SAME += ("jina_embeddings_v3", "eurobert")
CELLS = [
    pytest.param(
        name, column, marks=pytest.mark.slow if column == "compile" and name in SAME else ()
    )
    for name in ENCODERS
    for column in encoder_table.COLUMNS
]


@pytest.mark.parametrize(("name", "column"), CELLS)
def test_the_docs_say_what_it_can_do(name, column):
    """``python -m tests.models.encoder_table`` writes the table of docs/encoders.md anew."""
    cell = encoder_table.table_of_the_page()[encoder_table.row_name(name)][column]
    assert cell == encoder_table.COLUMNS[column](name)


def test_the_docs_have_no_other_rows():
    known = {f"`{stem}Model`" for stem, _ in DENSE.values()}
    assert set(encoder_table.table_of_the_page()) == known


@pytest.mark.parametrize("name", ["distilbert", "mpnet", "deberta_v2", "esm", "eurobert"])
def test_a_sentence_transformer_on_it_encodes(name, tmp_path):
    """Packed where it can be, and else padded, without being asked."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    path = save_sentence_transformer(tmp_path, name)
    texts = ["w1 w2 w3 w4", "w5", "w6 w7"]
    moe = moe_fast.upcycle(path, num_experts=2, routing="enforced", domains=["a", "b"])
    want = sentence_transformers.SentenceTransformer(path, device="cpu").encode(texts)
    got = torch.tensor(moe.encode(texts, domain="b"))
    assert relative_error(got, torch.tensor(want)) <= 1e-5


@pytest.mark.parametrize("name", ["mpnet", "esm"])
def test_packed_texts_are_refused_by_name(name):
    moe = moe_fast.upcycle(build(name), num_experts=2)
    message = f"{type(moe).__name__[3:-5]}'s texts cannot be packed .*: its .*'sdpa', or 'eager'"
    with pytest.raises(ValueError, match=message):
        moe(torch.full((1, 6), 7), cu_seq_lens_q=torch.tensor([0, 2, 6], dtype=torch.int32))


# --- encoders from outside -----------------------------------------------------------------------

BERT_LIKE = {
    "layers": "encoder.layer",
    "up": ("intermediate.dense",),
    "down": "output.dense",
    "mlp": ("intermediate", "output.dense"),
    "norm": "output.LayerNorm",
    "dropout": "output.dropout",
    "attention": "attention",
}


def test_the_example_of_the_docs_runs(table, tmp_path, batch):
    (code,) = encoder_table.code_under("One of your own")
    names = {}
    exec(compile(code, "docs/encoders.md", "exec"), names)
    exec(compile(code, "docs/encoders.md", "exec"), names)  # again, as in a notebook
    moe, dense = names["moe"].eval(), names["dense"].eval()
    with torch.no_grad():
        got, want = (m(**batch).last_hidden_state for m in (moe, dense))
    assert relative_error(got[0], want[0]) <= 1e-6
    moe.save_pretrained(tmp_path)
    assert same_weights(AutoModel.from_pretrained(tmp_path), moe)
    assert len([line for line in code.splitlines() if line]) <= 25


def test_an_encoder_without_an_entry_is_told_what_to_write():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = RemBertModel(RemBertConfig(vocab_size=9, intermediate_size=8, **sizes))
    with pytest.raises(TypeError, match="got RemBertModel") as error:
        moe_fast.upcycle(model, num_experts=2)
    assert "register_architecture(\n        RemBertModel," in str(error.value)
    assert "docs/encoders.md" in str(error.value)


def test_wrong_entries_are_refused(table):
    with pytest.raises(ValueError, match=r"BertModel .* must not be known already"):
        register_architecture(
            build("bert").__class__, RemBertLayer, **{**BERT_LIKE, "attention": "x"}
        )
    with pytest.raises(TypeError, match="dense_model must be a class of a transformers model"):
        register_architecture(RemBertConfig, RemBertLayer, **BERT_LIKE)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nrom'"):
        register_architecture(RemBertModel, RemBertLayer, **BERT_LIKE, nrom="output.LayerNorm")
    moe = register_architecture(
        RemBertModel, RemBertLayer, **{**BERT_LIKE, "norm": "output.layer_norm"}
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = moe.config_class(vocab_size=9, intermediate_size=8, **sizes)
    message = r"norm of the architecture RemBert must name modules of RemBertLayer .*LayerNorm.*"
    with pytest.raises(ValueError, match=message + "got 'output.layer_norm'"):
        moe(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_layer": "BertLayer"}, "dense_layer must be a class of a torch.nn.Module; got 'B"),
        ({"mlp": "intermediate"}, "mlp must be a tuple of names, at least one; got 'intermediate'"),
        ({"up": ()}, r"up must be a tuple of names, at least one; got \(\)"),
        ({"up": ("a", 3)}, "up must be a tuple of names"),
        ({"layers": None}, "layers must be a name; got None"),
        ({"down": ("output.dense",)}, "down must be a name; got"),
        ({"norm": ""}, "norm must be a name; got ''"),
        ({"attention": None}, "attention must be a name; got None"),
        ({"dropout": 0.1}, "dropout must be a name or None; got 0.1"),
        ({"attention_norm": True}, "attention_norm must be a name or None; got True"),
        ({"attention_dropout": ""}, "attention_dropout must be a name or None; got ''"),
        ({"activation": torch.nn.GELU()}, "activation must be the name of a field .*; got GELU"),
        ({"intermediate_size": 48}, "intermediate_size must be the name of a field .*; got 48"),
        ({"bias": None}, "bias must be True, False or the name of a field .*; got None"),
        ({"padding_id": -1}, "padding_id must be None, an id or the name of a field .*; got -1"),
        ({"gated": "yes"}, "gated must be True or False; got 'yes'"),
        ({"pre_norm": None}, "pre_norm must be True or False; got None"),
        ({"tuple_output": 1}, "tuple_output must be True or False; got 1"),
        ({"forward": "mpnet"}, r"forward must be None or a function that takes \*\*keywords"),
        ({"forward": len}, r"forward must be None or a function that takes \*\*keywords"),
        ({"not_packed": True}, "not_packed must be None or a reason, as text; got True"),
        ({"not_fused": ""}, "not_fused must be None or a reason, as text; got ''"),
    ],
    ids=str,
)
def test_fields_of_another_kind_are_named(changes, message, table):
    parts = {"dense_layer": RemBertLayer, **BERT_LIKE, **changes}
    with pytest.raises(TypeError, match=message):
        register_architecture(RemBertModel, **parts)
    assert "RemBert" not in {a.name for a in table}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": ("intermediate.dense", "output.dense")}, "up must name one linear map unless gat"),
        ({"up": ("a", "b", "c"), "gated": True}, "up must name one linear map, or two if gated"),
        ({"attention_dropout": "x"}, "attention_dropout must be None without attention_norm"),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together_are_named(changes, message, table):
    with pytest.raises(ValueError, match=message):
        register_architecture(RemBertModel, RemBertLayer, **{**BERT_LIKE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "layer"}, r"layers of the .* RemBert must be .*encoder\.layer\); got 'layer'"),
        ({"layers": "encoder"}, r"layers of the .*\(encoder\.layer\); got 'encoder'"),
        ({"dense_layer": BertLayer}, "dense_layer of the .* RemBertLayer; got BertLayer"),
        ({"attention": "self"}, "attention of the .* must name modules of RemBertL.*got 'self'"),
        (
            {"activation": "act"},
            "activation of the .*MoERemBertConfig, or one of gelu, .*; got 'act'",
        ),
        (
            {"intermediate_size": "ffn"},
            "intermediate_size of the .* field of MoERemBertConfig that holds a whole.*; got 'ffn'",
        ),
        ({"intermediate_size": "hidden_act"}, "intermediate_size of .*_act', which holds 'gelu'"),
        ({"bias": "mlp_bias"}, "bias of the .* that holds True or False.*; got 'mlp_bias'"),
        ({"bias": False}, "bias of the .* whether intermediate.dense have biases; got False"),
        ({"padding_id": "pad"}, "padding_id of the .* that holds an id; got 'pad'"),
        ({"gated": True}, r"up of the .* of \[32, 8\] in all.*intermediate\.dense with \[\[16, 8"),
        ({"up": ("output.dense",)}, r"up of the .* of \[16, 8\] in all.*dense with \[\[8, 16\]\]"),
        ({"down": "intermediate"}, r"down of the .* of \[8, 16\] in all.*intermediate with"),
        ({"norm": "output.dropout"}, "not_fused of the .* no nn.LayerNorm but a Dropout"),
    ],
    ids=str,
)
def test_entries_that_do_not_fit_the_encoder_are_named(changes, message, table):
    model = register_architecture(
        RemBertModel, **{"dense_layer": RemBertLayer, **BERT_LIKE, **changes}
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    with pytest.raises(ValueError, match=message):
        model(model.config_class(vocab_size=9, intermediate_size=16, **sizes))


def test_code_beside_a_model_is_not_run(tmp_path):
    build("bert").save_pretrained(tmp_path)
    config = '{"model_type": "theirs", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}'
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_encoder(str(tmp_path))
    assert not (tmp_path / "ran").exists()
