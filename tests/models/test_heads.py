"""Mixtures with a head: what the dense model with that head gives, for every encoder."""

import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModel

import moe_fast
from moe_fast.architectures import ARCHITECTURES, HEADS
from moe_fast.layers import ATTENTION
from moe_fast.models.registry import moe_head
from tests.layers.test_attention import padded
from tests.models import encoder_table
from tests.models.tiny import (
    CLS,
    DENSE,
    ENCODERS,
    build,
    build_head,
    relative_error,
    same_weights,
)

DOMAINS = {"routing": "enforced", "domains": ["a", "b", "c"], "cls_token_id": CLS}
PAIRS = [(name, head) for name in ENCODERS for head in HEADS]
PACKED = [
    (name, head)
    for name, head in PAIRS
    if next(a for a in ARCHITECTURES if a.name == DENSE[name][0]).not_packed is None
]
# Their losses choose rows by the labels' values, or make a tensor of a loss's attribute.
LOSS_BREAKS_GRAPH = [
    ("deberta", "ForSequenceClassification"),
    ("deberta_v2", "ForSequenceClassification"),
    ("xlm_roberta_xl", "ForTokenClassification"),
]
every = pytest.mark.parametrize(("name", "head"), PAIRS)


def auto(head):
    return getattr(transformers, f"AutoModel{head}")


def labelled(head, batch):
    """The batch with labels for the head; those of padding are left out of the loss."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if head == "ForSequenceClassification":
        labels = torch.arange(len(ids)) % 3
    elif head == "ForTokenClassification":
        labels = torch.where(mask, ids % 3, -100)
    else:
        labels = torch.where(mask & (ids % 2 == 0), ids, -100)
    return {**batch, "labels": labels}


def real(head, logits, batch):
    """The logits that mean something: of texts, or of their real tokens."""
    tokens = head != "ForSequenceClassification"
    return logits[batch["attention_mask"].bool()] if tokens else logits


def experts_apart(moe):
    """The mixture in float64, its experts different and its router clear."""
    torch.manual_seed(1)
    with torch.no_grad():
        for mlp in moe.moe_mlps().values():
            for parameter in mlp.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return moe.double()


def test_every_dense_head_has_a_mixture():
    assert len(PAIRS) == 3 * len(ENCODERS), "an encoder lacks a head: say so in docs/encoders.md"
    for architecture in ARCHITECTURES:
        assert set(architecture.heads) == set(HEADS)
        for head, dense in architecture.heads.items():
            moe = moe_head(architecture, head)
            assert issubclass(moe, dense) and moe.__name__ == f"MoE{dense.__name__}"
            assert moe is getattr(moe_fast.models, moe.__name__)


@every
def test_upcycled_equals_dense(name, head, batch):
    """One expert per token to 1e-6, two to 1e-5, whose weights sum to 1 to rounding."""
    dense = build_head(name, head)
    inputs = labelled(head, batch)
    with torch.no_grad():
        want = dense(**inputs)
        for settings, tolerance in (({}, 1e-6), ({"num_experts_per_tok": 2}, 1e-5)):
            moe = moe_fast.upcycle(dense, num_experts=3, **settings)
            assert type(moe).__name__ == f"MoE{type(dense).__name__}"
            got = moe(**inputs)
            logits = (real(head, output.logits, batch) for output in (got, want))
            assert relative_error(*logits) <= tolerance
            assert relative_error(got.loss, want.loss) <= tolerance
    assert "router_logits" not in got


@every
def test_domain_tokens_lie_behind_the_vocabulary(name, head, batch):
    """A decoder has a column for each, equal to [CLS]'s at first; the loss is over all columns."""
    dense = build_head(name, head)
    moe = moe_fast.upcycle(dense, num_experts=3, **DOMAINS)
    inputs = labelled(head, batch)
    with torch.no_grad():
        got, want = moe(**inputs, domain="b"), dense(**inputs)
        by_ids = moe(**inputs, expert_ids=torch.tensor([1, 1, 1]))
    assert torch.equal(by_ids.logits, got.logits)
    logits, wanted = (real(head, output.logits, batch) for output in (got, want))
    assert relative_error(logits[..., : wanted.shape[-1]], wanted) <= 1e-6
    if head != "ForMaskedLM":
        assert relative_error(got.loss, want.loss) <= 1e-6
        return
    size = dense.config.vocab_size
    assert got.logits.shape[-1] == moe.config.vocab_size == size + 3
    assert torch.equal(logits[:, size:], logits[:, CLS, None].expand(-1, 3))
    loss = cross_entropy(got.logits.flatten(0, 1), inputs["labels"].flatten())
    assert relative_error(got.loss, loss) <= 1e-6


@pytest.mark.parametrize("settings", [{"num_experts_per_tok": 2, "layers": "alternate"}, DOMAINS])
@every
def test_extract_gives_the_weights_back(name, head, settings):
    dense = build_head(name, head)
    back = moe_fast.extract_expert(moe_fast.upcycle(dense, num_experts=3, **settings), 1)
    assert type(back) is type(dense) and same_weights(back, dense)
    want, got = dense.config.to_dict(), back.config.to_dict()
    assert {k: got[k] for k in want if k != "architectures"} == {
        k: want[k] for k in want if k != "architectures"
    }


@every
def test_save_and_load(name, head, batch, tmp_path):
    moe = moe_fast.upcycle(build_head(name, head), num_experts=3, **DOMAINS)
    moe.save_pretrained(tmp_path)
    loaded, info = auto(head).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded) is type(moe) and same_weights(loaded, moe)
    with torch.no_grad():
        got, want = (model(**batch, domain="c").logits for model in (loaded, moe))
    assert torch.equal(got, want)
    assert f"AutoModel{head}.from_pretrained" in (tmp_path / "README.md").read_text("utf-8")
    copy = pickle.loads(pickle.dumps(moe))
    assert type(copy) is type(moe) and same_weights(copy, moe)


@every
def test_gradient_checkpointing(name, head, batch):
    moe = moe_fast.upcycle(build_head(name, head), num_experts=3, num_experts_per_tok=2).train()
    inputs = labelled(head, batch)

    def gradients():
        moe.zero_grad()
        output = moe(**inputs, output_router_logits=True)
        assert [tuple(x.shape) for x in output.router_logits] == [(27, 3)] * 3
        assert [int(x.sum()) for x in output.tokens_per_expert] == [32] * 3
        (output.loss + sum(x.pow(2).sum() for x in output.router_logits)).backward()
        return {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}

    plain, ran = gradients(), []
    moe.moe_mlps()[1].register_forward_pre_hook(lambda *_: ran.append(1))
    moe.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients()
    assert len(ran) == 2, "the layer was not recomputed"
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


# --- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "head"), PACKED)
def test_packed_equals_padded(name, head):
    """Packed for one call, by the attention, and by the caller, who gets a text's logits a row."""
    moe = experts_apart(moe_fast.upcycle(build_head(name, head), num_experts=3, **DOMAINS))
    lengths = [9, 5, 2, 12]
    torch.manual_seed(2)
    batch = padded(lengths, pad=moe.config.pad_token_id)
    ids = torch.tensor([0, 2, 1, 0])
    with torch.no_grad():
        want = real(head, moe(**batch, expert_ids=ids).logits, batch)
        once = moe(**batch, expert_ids=ids, packed=True)
        moe.set_attn_implementation(ATTENTION)
        always = moe(**batch, expert_ids=ids)
        flat = batch["input_ids"][batch["attention_mask"].bool()][None]
        starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        packed = moe(flat, cu_seq_lens_q=starts, expert_ids=ids)
    for output in (once, always):
        assert relative_error(real(head, output.logits, batch), want) <= 1e-12
    got = packed.logits if head == "ForSequenceClassification" else packed.logits[0]
    assert got.shape == want.shape and relative_error(got, want) <= 1e-12


@pytest.mark.parametrize(
    ("name", "poolings"), [("modernbert", ("cls", "mean")), ("eurobert", ("bos", "mean", "late"))]
)
def test_packed_texts_are_pooled_one_by_one(name, poolings):
    for pooling in poolings:
        dense = build_head(name, "ForSequenceClassification", classifier_pooling=pooling)
        moe = experts_apart(moe_fast.upcycle(dense, num_experts=3))
        torch.manual_seed(2)
        batch = padded([4, 7], pad=moe.config.pad_token_id)
        starts = torch.tensor([0, 4, 11], dtype=torch.int32)
        with torch.no_grad():
            want = moe(**batch).logits
            moe.set_attn_implementation(ATTENTION)
            flat = batch["input_ids"][batch["attention_mask"].bool()][None]
            got = moe(flat, cu_seq_lens_q=starts).logits
        assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize(("name", "head"), [pair for pair in PAIRS if pair not in PACKED])
def test_packing_is_refused_by_name(name, head, batch):
    moe = experts_apart(moe_fast.upcycle(build_head(name, head), num_experts=2))
    with torch.no_grad():
        got, want = (moe(**batch, packed=packed).logits for packed in (True, False))
    assert torch.equal(got, want), "padded, where it was only allowed to pack"
    message = rf"{DENSE[name][0]}'s texts cannot be packed .*'sdpa', or 'eager'"
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        moe(torch.full((1, 6), 7), cu_seq_lens_q=starts)


def test_starts_that_do_not_fit_are_refused():
    moe = moe_fast.upcycle(build_head("roberta", "ForSequenceClassification"), num_experts=2)
    moe.set_attn_implementation(ATTENTION)
    ids = torch.full((1, 6), 7)
    for starts in ([0, 4, 2], [0, 2, 5], [1]):
        with pytest.raises(ValueError, match="cu_seq"):
            moe(ids, cu_seq_lens_q=torch.tensor(starts, dtype=torch.int32))


# --- calls ---------------------------------------------------------------------------------------


# One that hands routing on, one that drops it, a gated one, one whose output has no token types.
KINDS = ("bert", "mpnet", "modernbert", "distilbert")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        pytest.param(
            name,
            head,
            marks=() if name in KINDS and head == "ForMaskedLM" else pytest.mark.slow,
        )
        for name, head in PAIRS
    ],
)
def test_compile(name, head):
    """With the loss, but for three whose loss breaks the graph in transformers' own forward."""
    torch._dynamo.reset()
    layers = {"n_layers" if name == "distilbert" else "num_hidden_layers": 1}
    moe = experts_apart(moe_fast.upcycle(build_head(name, head, **layers), num_experts=3))
    torch.manual_seed(2)
    batch = padded([9, 5, 12], pad=moe.config.pad_token_id)
    if (name, head) not in LOSS_BREAKS_GRAPH:
        batch = labelled(head, batch)
    graph = torch.compile(moe, fullgraph=True, backend="eager")
    with torch.no_grad():
        got, want = graph(**batch), moe(**batch)
    assert relative_error(got.logits, want.logits) <= 1e-12
    if "labels" in batch:
        assert relative_error(got.loss, want.loss) <= 1e-12


@pytest.mark.parametrize("name", KINDS)
def test_calls_are_those_of_the_dense_model(name, batch):
    """Arguments by place, tuples, hidden states, and keywords of transformers' Trainer."""
    dense = build_head(name, "ForMaskedLM")
    moe = moe_fast.upcycle(dense, num_experts=2)
    inputs = labelled("ForMaskedLM", batch)
    options = {"num_items_in_batch": 7, "output_hidden_states": True}
    with torch.no_grad():
        for model in (moe, dense):
            model.config.output_attentions = False
        got, want = (m(inputs["input_ids"], inputs["attention_mask"]) for m in (moe, dense))
        rich, plain = (m(**inputs, **options) for m in (moe, dense))
        as_tuple = moe(**inputs, return_dict=False)
    assert relative_error(*(real("ForMaskedLM", o.logits, batch) for o in (got, want))) <= 1e-6
    assert relative_error(rich.loss, plain.loss) <= 1e-6
    assert len(rich.hidden_states) == len(plain.hidden_states) == 4
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 2
    assert torch.equal(as_tuple[1], moe(**inputs).logits)
    with pytest.raises(ValueError, match="expert_ids need routing='enforced'"):
        moe(**inputs, expert_ids=torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["bert", "roberta", "esm"])
def test_no_texts(name):
    for head in HEADS:
        moe = moe_fast.upcycle(build_head(name, head), num_experts=2)
        tokens = () if head == "ForSequenceClassification" else (6,)
        width = moe.config.vocab_size if head == "ForMaskedLM" else 3
        ids = torch.zeros(0, 6, dtype=torch.int64)
        assert moe(ids, attention_mask=ids).logits.shape == (0, *tokens, width)


# --- tied weights --------------------------------------------------------------------------------


@every
def test_decoders_stay_tied(name, head, tmp_path):
    """What the dense model ties is one weight in the mixture, too: made, loaded and trained."""
    dense = build_head(name, head)
    moe = moe_fast.upcycle(dense, num_experts=3, **DOMAINS)
    moe.save_pretrained(tmp_path)
    loaded = auto(head).from_pretrained(tmp_path)
    back = moe_fast.extract_expert(moe, "a")
    tied = shared_names(dense)
    if head == "ForMaskedLM" and dense.config.tie_word_embeddings:
        assert tied
    for model in (moe, loaded, back):
        assert shared_names(model) == tied
    assert moe.num_parameters() > dense.num_parameters()


def shared_names(model):
    """Sets of names of one parameter."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "electra"])
def test_decoders_that_are_not_tied_stay_apart(name, batch):
    dense = build_head(name, "ForMaskedLM", tie_word_embeddings=False)
    moe = moe_fast.upcycle(dense, num_experts=3, **DOMAINS)
    assert shared_names(dense) == shared_names(moe) == []
    assert same_weights(moe_fast.extract_expert(moe, 2), dense)
    with torch.no_grad():
        got, want = moe(**batch, domain="a").logits, dense(**batch).logits
    mask = batch["attention_mask"].bool()
    assert relative_error(got[..., :-3][mask], want[mask]) <= 1e-6


def test_weights_that_contradict_their_tie_are_refused(bert_mlm):
    decoder = bert_mlm.cls.predictions.decoder
    decoder.weight = torch.nn.Parameter(decoder.weight + 1)
    with pytest.raises(ValueError, match=r"cls.predictions.decoder.weight must be .*tie_word"):
        moe_fast.upcycle(bert_mlm, num_experts=2)
    bert_mlm.config.tie_word_embeddings = False
    bert_mlm.cls.predictions.decoder.bias = torch.nn.Parameter(decoder.bias + 1)
    moe = moe_fast.upcycle(bert_mlm, num_experts=2)
    assert torch.equal(moe.cls.predictions.decoder.bias, decoder.bias)


@pytest.fixture
def bert_mlm():
    return build_head("bert", "ForMaskedLM")


# --- checkpoints ---------------------------------------------------------------------------------


def test_the_encoder_of_a_folder_with_a_head_loads_alone(bert_mlm, batch, tmp_path):
    moe = moe_fast.upcycle(bert_mlm, num_experts=2)
    moe.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert type(bare).__name__ == "MoEBertModel" and bare.pooler is not None
    with torch.no_grad():
        got, want = bare(**batch).last_hidden_state, moe.bert(**batch).last_hidden_state
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "jina_embeddings_v3"])
def test_a_new_head_on_a_bare_mixture_is_said(name, tmp_path, caplog):
    moe = moe_fast.upcycle(build(name), num_experts=2)
    moe.save_pretrained(tmp_path)
    for head in HEADS:
        caplog.clear()
        model = auto(head).from_pretrained(tmp_path)
        assert f"has no head of {type(model).__name__}: the head is new" in caplog.text
        assert same_weights(model.moe_mlps()[0], moe.moe_mlps()[0])


def change(folder, **changes):
    """Change the weights in a folder: ``None`` removes one, a name's ``__`` are dots."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, value in changes.items():
        weights.pop(name.replace("__", "."), None)
        if value is not None:
            weights[name.replace("__", ".")] = value
    save_file(weights, path, metadata={"format": "pt"})


def test_checkpoints_that_do_not_fill_the_model_are_refused(tmp_path):
    moe = moe_fast.upcycle(build_head("bert", "ForSequenceClassification"), num_experts=2)
    load = auto("ForSequenceClassification").from_pretrained
    name = "bert.encoder.layer.1.mlp.up_proj"
    for missing in (name, "classifier.bias", "bert.pooler.dense.weight"):
        moe.save_pretrained(tmp_path)
        change(tmp_path, **{missing: None})
        message = rf"lacks weights of MoEBertForSequenceClassification: {missing}"
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    moe.save_pretrained(tmp_path)
    change(tmp_path, **{name: torch.zeros(2, 3, 4)})
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        load(tmp_path)


def test_checkpoints_that_fill_the_model_twice_are_refused(bert_mlm, tmp_path):
    moe = moe_fast.upcycle(bert_mlm, num_experts=2)
    load = auto("ForMaskedLM").from_pretrained
    moe.save_pretrained(tmp_path)
    name = "encoder.layer.1.mlp.up_proj"
    change(tmp_path, **{name: torch.zeros_like(moe.bert.get_parameter(name))})
    with pytest.raises(ValueError, match=rf"weights of MoEBertForMaskedLM twice: {name} as bert."):
        load(tmp_path)
    with pytest.raises(ValueError, match=rf"weights of MoEBertModel twice: {name} as bert."):
        AutoModel.from_pretrained(tmp_path)
    moe.save_pretrained(tmp_path)
    decoder = "cls.predictions.decoder.weight"
    change(tmp_path, **{decoder: torch.zeros_like(moe.get_parameter(decoder))})
    with pytest.raises(ValueError, match=rf"two different weights, {decoder} and bert.embeddings"):
        load(tmp_path)


def test_configurations_newer_than_known_are_refused(bert_mlm, tmp_path):
    moe_fast.upcycle(bert_mlm, num_experts=2).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text("utf-8")
    newer = config.replace(
        f'"moe_fast_version": "{moe_fast.__version__}"', '"moe_fast_version": "99.1"'
    )
    (tmp_path / "config.json").write_text(newer, "utf-8")
    with pytest.raises(ValueError, match=r"moe_fast 99.1, newer than this"):
        auto("ForMaskedLM").from_pretrained(tmp_path)


def test_code_beside_a_model_is_not_run(bert_mlm, tmp_path):
    moe_fast.upcycle(bert_mlm, num_experts=2).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text("utf-8")
    code = '"auto_map": {"AutoModelForMaskedLM": "code.M"}, "model_type": "moe_bert"'
    (tmp_path / "config.json").write_text(config.replace('"model_type": "moe_bert"', code), "utf-8")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    model = auto("ForMaskedLM").from_pretrained(tmp_path)
    assert type(model).__name__ == "MoEBertForMaskedLM" and not (tmp_path / "ran").exists()


def test_heads_that_there_are_not(bert):
    with pytest.raises(AttributeError, match=r"MoEBertForMaskedLM, MoEBertForSequence"):
        _ = moe_fast.models.MoEBertForQuestionAnswering
    dense = transformers.ElectraForPreTraining(build("electra").config)
    with pytest.raises(TypeError, match=r"got ElectraForPreTraining. .*ElectraForTokenClass"):
        moe_fast.upcycle(dense, num_experts=2)


# --- other conversions ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "mpnet", "eurobert"])
def test_models_with_a_head_are_joined_and_grown(name):
    first, second = build_head(name, "ForMaskedLM"), build_head(name, "ForMaskedLM")
    with torch.no_grad():
        for part, parameter in second.named_parameters():
            own = ("mlp.", "intermediate.", "output.dense", "bias")
            if any(word in part for word in own) and "attention" not in part:
                parameter += 0.1
    moe = moe_fast.from_experts([first, second], domains=["a", "b"], cls_token_id=CLS)
    assert same_weights(moe_fast.extract_expert(moe, "a"), first)
    grown = moe_fast.add_expert(moe, "c", from_expert="b")
    assert grown.config.vocab_size == 63 and grown.get_output_embeddings().weight.shape[0] == 63
    assert same_weights(moe_fast.extract_expert(grown, "c"), moe_fast.extract_expert(moe, "b"))
    assert same_weights(moe_fast.remove_expert(grown, "c"), moe)


def test_embeddings_are_frozen_with_a_head(bert_mlm):
    from moe_fast.conversion import set_trainable

    moe = moe_fast.upcycle(bert_mlm, num_experts=2)
    set_trainable(moe, freeze_embeddings=True)
    assert not moe.bert.embeddings.word_embeddings.weight.requires_grad
    assert moe.cls.predictions.transform.dense.weight.requires_grad
    set_trainable(moe, "experts")
    trained = {name for name, p in moe.named_parameters() if p.requires_grad}
    assert trained and all(".mlp." in name for name in trained)


def test_the_registered_ones_have_heads_too():
    from transformers import Data2VecTextConfig, Data2VecTextForMaskedLM, Data2VecTextModel
    from transformers.models.data2vec.modeling_data2vec_text import Data2VecTextLayer

    before = list(ARCHITECTURES)
    bert = next(a for a in ARCHITECTURES if a.name == "Bert")
    parts = ("layers", "up", "down", "mlp", "norm", "dropout", "attention")
    try:
        moe_fast.models.register_architecture(
            Data2VecTextModel,
            Data2VecTextLayer,
            padding_id="pad_token_id",
            **{part: getattr(bert, part) for part in parts},
        )
        dense = Data2VecTextForMaskedLM(Data2VecTextConfig(**DENSE["bert"][1])).eval()
        moe = moe_fast.upcycle(dense, num_experts=2)
        assert type(moe).__name__ == "MoEData2VecTextForMaskedLM"
        assert same_weights(moe_fast.extract_expert(moe, 0), dense)
    finally:
        ARCHITECTURES[:] = before


def test_the_example_of_the_docs_runs():
    code, *sketches = encoder_table.code_under("Heads")
    names = {}
    exec(compile(code, "docs/encoders.md", "exec"), names)
    assert type(names["moe"]).__name__ == "MoEBertForMaskedLM"
    assert names["output"].logits.shape == (1, 5, 102) and names["output"].loss > 0
    for sketch in sketches:
        compile(sketch, "docs/encoders.md", "exec")


def test_positional_arguments_are_pythons(batch):
    moe = moe_fast.upcycle(build_head("bert", "ForMaskedLM"), num_experts=2)
    ids = batch["input_ids"]
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        moe(ids, input_ids=ids)
    with pytest.raises(TypeError, match="too many positional arguments"):
        moe(ids, *[None] * 30)
