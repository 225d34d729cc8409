"""import_nomic and export_nomic, against an oracle that shares nothing with them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_fast
from moe_fast.conversion import nomic
from tests.conversion.nomic_oracle import (
    CONFIG,
    PROMPTS,
    embedding,
    hidden_states,
    random_weights,
    tokens,
    write_folder,
)
from tests.models.tiny import build, relative_error, same_weights

pytest.importorskip("transformers.models.jina_embeddings_v3")
pytest.importorskip("sentence_transformers")

from moe_fast.models.modeling import MoEJinaEmbeddingsV3Model

TEXTS = ["w0 w1 w2 w3 w4 w5 w6", "w7", "w8 w9 w0 w8", "w40 w41 w42 w42 w43 w44 w45 w46 w47 w48 w49"]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "theirs")


@pytest.fixture
def model(folder):
    return moe_fast.import_nomic(folder)


def theirs(text, weights=None, prompt="query"):
    return embedding(weights or random_weights(), PROMPTS[prompt] + text)


def same_files(one, other):
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    same = a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    return same and configs[0] == configs[1]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("prompt", ["query", "passage"])
def test_embeddings_are_the_oracles(model, packed, prompt):
    got = torch.tensor(model.encode(TEXTS, prompt_name=prompt, packed=packed))
    want = torch.stack([theirs(text, prompt=prompt) for text in TEXTS])
    assert (got - want).abs().max() <= 1e-5
    short = torch.tensor(model.encode(TEXTS, prompt_name=prompt, packed=packed, truncate_dim=8))
    assert (short - want[:, :8]).abs().max() <= 1e-5


def test_in_float64_to_rounding(tmp_path):
    """Far below what the bias inside the sum, or another choice of experts, would change."""
    weights = random_weights(torch.float64)
    config = {**CONFIG, "torch_dtype": "float64"}
    moe = moe_fast.import_nomic(write_folder(tmp_path, weights, config, modules=False))
    assert type(moe).__name__ == "MoEJinaEmbeddingsV3Model" and moe.pooler is None
    for text in TEXTS:
        ids = tokens(text)
        with torch.no_grad():
            got = moe(ids[None]).last_hidden_state[0]
        assert relative_error(got, hidden_states(weights, ids)) <= 1e-6  # positions: float32


@pytest.mark.parametrize("mistake", ["renormalized", "bias weighted", "bias left out"])
def test_the_oracle_tells_the_likely_mistakes(model, mistake):
    for mlp in model.transformers_model.moe_mlps().values():
        if mistake == "renormalized":
            mlp.router.weight_mode = "renormalize"
        else:  # the two largest shares sum to about 0.6
            mlp.output_bias.data *= 0.6 if mistake == "bias weighted" else 0.0
    got = torch.tensor(model.encode(TEXTS, prompt_name="query"))
    want = torch.stack([theirs(text) for text in TEXTS])
    assert (got - want).abs().max() > 1e-3


def test_the_published_sizes_have_the_published_names_and_numbers():
    """148 tensors of 475,292,928 numbers, by those who have read the file (tt-metal)."""
    sizes = {"n_embd": 768, "n_head": 12, "n_inner": 3072, "n_layer": 12, "n_positions": 2048}
    settings = nomic._settings({**CONFIG, **sizes, "num_experts": 8, "vocab_size": 250048})
    with torch.device("meta"):
        mixture = MoEJinaEmbeddingsV3Model(
            MoEJinaEmbeddingsV3Model.config_class(**settings), add_pooling_layer=False
        )
    state, names = mixture.state_dict(), nomic._their_names(mixture.config)
    joined = {name: nomic._joined(name, [state[p] for p in ours]) for name, ours in names.items()}
    assert len(joined) == 148 and sum(t.numel() for t in joined.values()) == 475_292_928
    assert joined["encoder.layers.11.mlp.experts.mlp.w2"].shape == (24576, 768)
    assert joined["encoder.layers.10.attn.Wqkv.bias"].shape == (2304,)


def test_what_is_read(model):
    moe = model.transformers_model
    assert moe.config.moe_layers == [1, 3] and model.prompts | PROMPTS == model.prompts
    assert model.max_seq_length == 24 and model.similarity_fn_name == "cosine"
    assert not any(name.endswith("proj_bias") for name in moe.moe_mlps()[1].state_dict())
    numbers = sum(tensor.numel() for tensor in random_weights().values())
    assert moe.num_parameters() == numbers
    idle = 2 * 2 * 2 * CONFIG["n_inner"] * CONFIG["n_embd"]  # layers, experts, projections
    assert moe.num_parameters(only_active=True) == numbers - idle


def test_export_is_bit_for_bit(model, folder, tmp_path):
    moe_fast.export_nomic(model, tmp_path / "back")
    assert same_files(folder, tmp_path / "back")
    again = moe_fast.import_nomic(tmp_path / "back")
    assert again.prompts == model.prompts and again.max_seq_length == model.max_seq_length
    assert same_weights(again.transformers_model, model.transformers_model)
    assert (again.encode(TEXTS) == model.encode(TEXTS)).all()
    bare = tmp_path / "bare"
    moe_fast.export_nomic(model.transformers_model, bare)
    assert same_files(folder, bare) and not (bare / "modules.json").exists()


def test_saved_loaded_and_exported(model, folder, tmp_path):
    model.save_pretrained(str(tmp_path / "ours"))
    loaded = moe_fast.MoESentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert (
        loaded.encode(TEXTS, prompt_name="query") == model.encode(TEXTS, prompt_name="query")
    ).all()
    moe_fast.export_nomic(loaded, tmp_path / "back")
    assert same_files(folder, tmp_path / "back")


def test_half_precision_stays(tmp_path):
    weights = random_weights(torch.bfloat16)
    folder = write_folder(tmp_path / "half", weights, {**CONFIG, "torch_dtype": "bfloat16"})
    model = moe_fast.import_nomic(folder)
    assert model.transformers_model.dtype == torch.bfloat16
    moe_fast.export_nomic(model, tmp_path / "back")
    assert same_files(folder, tmp_path / "back")


def test_training_lowers_the_loss_and_theirs_reads_the_result(model, tmp_path):
    encoder = model.train().transformers_model
    loss_function = moe_fast.losses.InfoNCELoss(model)
    columns = [
        model.preprocess([PROMPTS[prompt] + text for text in texts])
        for prompt, texts in (("query", TEXTS), ("passage", TEXTS[1:] + TEXTS[:1]))
    ]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = loss_function([dict(column) for column in columns], None)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in encoder.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    moe_fast.export_nomic(model, tmp_path / "trained")
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    for name, before in random_weights().items():
        assert not torch.equal(trained[name], before), name
    got = torch.tensor(model.encode(TEXTS, prompt_name="query"))
    want = torch.stack([theirs(text, trained) for text in TEXTS])
    assert (got - want).abs().max() <= 1e-5


@pytest.mark.slow
def test_compiles_as_one_graph(model):
    encoder = model.transformers_model
    ids = tokens(TEXTS[0])[None]
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    with torch.no_grad():
        got, want = (m(ids).last_hidden_state for m in (compiled, encoder))
    assert relative_error(got, want) <= 1e-6


def test_experts_can_be_added_and_removed(model, tmp_path):
    grown = moe_fast.add_expert(model, from_expert=1)
    moe_fast.export_nomic(grown, tmp_path / "grown")
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert config == {**CONFIG, "num_experts": 5}
    back = moe_fast.remove_expert(moe_fast.import_nomic(tmp_path / "grown"), 4)
    assert same_weights(back.transformers_model, model.transformers_model)
    with pytest.raises(ValueError, match="with shared_bias=True they share one"):
        moe_fast.extract_expert(model, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_jitter_eps": 0.1}, "moe_jitter_eps is not known to this version"),
        ({"moe_normalize_expert_weights": True}, "moe_normalize_expert_weights must be False; got"),
        ({"moe_impl": "torch"}, "moe_impl must be 'megablocks'; got 'torch'"),
        ({"num_shared_experts": 1}, "num_shared_experts must be 0; got 1"),
        ({"expert_choice_router": True}, "expert_choice_router must be False; got True"),
        ({"activation_function": "swiglu"}, "activation_function must be 'gelu'; got 'swiglu'"),
        ({"prenorm": True}, "prenorm must be False; got True"),
        ({"model_type": "bert"}, "model_type must be 'nomic_bert'; got 'bert'"),
        ({"num_experts": True}, "num_experts must be a whole number above 0; got True"),
        ({"moe_every_n_layers": 0}, "moe_every_n_layers must be a whole number above 0; got 0"),
        ({"moe_every_n_layers": 1}, "moe_layers must be distinct indices"),
        ({"moe_top_k": 9}, "num_experts_per_tok must lie in 1 .. num_experts = 4; got 9"),
        ({"rotary_emb_base": "10000"}, "rotary_emb_base must be a number; got '10000'"),
        ({"moe_resid_pdrop": 0.1}, "moe_resid_pdrop must be resid_pdrop = 0.0"),
        ({"n_head": 32}, "n_embd must be a multiple of 2 n_head = 64"),
        ({"vocab_size": 65}, "vocab_size must be a multiple of pad_vocab_size_multiple = 64"),
        ({"n_inner": 24}, r"shapes differ: .*w1 \[192, 32\], not \[96, 32\]"),
    ],
)
def test_settings_that_are_not_known_are_named(tmp_path, changes, message):
    folder = write_folder(tmp_path, config={**CONFIG, **changes})
    with pytest.raises(ValueError, match=message):
        moe_fast.import_nomic(folder)


def test_a_setting_that_is_missing_is_named(tmp_path):
    config = {k: v for k, v in CONFIG.items() if k not in ("moe_impl", "layer_norm_epsilon")}
    with pytest.raises(ValueError, match=r"moe_impl must .*got 'nothing'; layer_norm_epsilon must"):
        moe_fast.import_nomic(write_folder(tmp_path, config=config))


LAYER = "encoder.layers.1.mlp"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LAYER}.experts.bias": None}, f"the checkpoint lacks: {LAYER}.experts.bias"),
        ({f"{LAYER}.fc1.weight": torch.zeros(48, 32)}, f"no place for: {LAYER}.fc1.weight"),
        ({f"bert.{LAYER}.experts.bias": torch.zeros(32)}, f"no place for: bert.{LAYER}.experts"),
        ({f"{LAYER}.experts.mlp.w2": torch.zeros(190, 32)}, r"w2 \[190, 32\], not \[192, 32\]"),
        ({"emb_ln.bias": torch.zeros(32).half()}, "one dtype: torch.float16, torch.float32"),
    ],
)
def test_weights_that_do_not_fill_the_model_are_named(tmp_path, changes, message):
    weights = {k: v for k, v in (random_weights() | changes).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        moe_fast.import_nomic(write_folder(tmp_path, weights))


def test_shards_are_read_and_may_not_give_a_weight_twice(model, folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(weights.items())[:9]), dict(list(weights.items())[9:])]
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file)
    again = moe_fast.import_nomic(folder)
    assert same_weights(again.transformers_model, model.transformers_model)
    save_file({**parts[1], "emb_ln.bias": torch.zeros(32)}, folder / files[1])
    with pytest.raises(ValueError, match="gives weights a second time: emb_ln.bias"):
        moe_fast.import_nomic(folder)


def test_pickles_are_refused(folder):
    (folder / "model.safetensors").unlink()
    torch.save(random_weights(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="may hold a pickle"):
        moe_fast.import_nomic(folder)


def test_code_beside_the_model_is_not_run(tmp_path):
    code = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    folder = write_folder(tmp_path / "theirs", config={**CONFIG, "auto_map": code})
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    moe_fast.import_nomic(folder)
    assert not (tmp_path / "ran").exists()


def test_what_else_is_refused(model, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere"):
        moe_fast.import_nomic(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="exists already"):
        moe_fast.export_nomic(model, folder)
    mixture = moe_fast.upcycle(build("bert"), num_experts=2)
    with pytest.raises(ValueError, match="model must come from import_nomic"):
        moe_fast.export_nomic(mixture, tmp_path / "new")
    with pytest.raises(TypeError, match="model must be a mixture"):
        moe_fast.export_nomic(build("bert"), tmp_path / "new")
    model.transformers_model.config.weight_mode = "renormalize"
    with pytest.raises(ValueError, match="weight_mode must be 'probability'"):
        moe_fast.export_nomic(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("modules", [True, False])
def test_other_doors_say_what_reads_it(tmp_path, modules):
    folder = write_folder(tmp_path, modules=modules)
    with pytest.raises(ValueError, match="read its folder with moe_fast.import_nomic"):
        moe_fast.upcycle(str(folder), num_experts=2)
