"""Damaged model folders: configurations, indexes, weights, modules, tokenizers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.hostile.cases import Case, damaged_bytes, nothing

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def embed(path: Path) -> None:
    """Load a SentenceTransformer and embed a text, as ``moe-fast embed`` does."""
    from moe_fast.inference import EncoderSettings
    from moe_fast.inference.text_encoder import TextEncoder

    encoder = TextEncoder(EncoderSettings(str(path), device="cpu"))
    known = getattr(encoder.model.transformers_model.config, "domains", None)
    encoder.encode(["w1 w2 w3", "w4"], [known[0]] * 2 if known else None)


def upcycle(path: Path) -> None:
    """Read a bare dense encoder, as ``moe-fast upcycle`` does, and run it."""
    import moe_fast

    run(moe_fast.upcycle(str(path), num_experts=2))


def load(path: Path) -> None:
    """Read a bare encoder, as ``moe-fast inspect`` does, and run it."""
    from moe_fast.models.loading import load_encoder

    run(load_encoder(str(path)))


def run(model: Any) -> None:
    """One batch through an encoder."""
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([[4, 7, 8, 5]])).last_hidden_state
    if not hidden.isfinite().all():
        raise AssertionError("NaN came out")


def cases() -> Iterator[Case]:
    """All of this file."""
    yield from _controls()
    yield from _json_files()
    yield from _settings()
    yield from _weights()
    yield from _indexes()
    yield from _modules()


def _controls() -> Iterator[Case]:
    def add_key(path: Path) -> None:
        edit(path / "config.json", lambda c: c | {"somebody_elses": {"key": 1}})

    def legacy(path: Path) -> None:
        """The names of old checkpoints, a head, and no pooler."""
        old = {}
        for name, value in load_file(path / WEIGHTS).items():
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            if not name.startswith("pooler."):
                old["bert." + new.replace("LayerNorm.bias", "LayerNorm.beta")] = value
        old["cls.predictions.bias"] = torch.zeros(60)
        old["bert.embeddings.position_ids"] = torch.arange(40)[None]
        save_file(old, path / WEIGHTS, metadata={"format": "pt"})

    for base, use in (("dense", embed), ("moe", embed), ("bare", upcycle), ("shards", upcycle)):
        yield Case("control", f"{base} as it is", base, nothing, use, control=True)
        yield Case("control", f"{base}, another key", base, add_key, use, control=True)
    for base, use in (("dense", embed), ("bare", upcycle)):
        yield Case("control", f"{base}, legacy names", base, legacy, use, control=True)
    half = retyped(lambda name, value: value.half())
    yield Case("control", "bare in half precision", "bare", half, load, control=True)


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file says."""
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


_FILES = (
    ("dense", "config.json", embed),
    ("dense", "modules.json", embed),
    ("dense", "1_Pooling/config.json", embed),
    ("dense", "config_sentence_transformers.json", embed),
    ("dense", "tokenizer.json", embed),
    ("moe", "config.json", embed),
    ("bare", "config.json", upcycle),
    ("shards", INDEX, upcycle),
    ("moe_shards", INDEX, load),
)
_CONTENTS = {
    "a list": "[]",
    "a list of lists": "[[1]]",
    "null": "null",
    "a number": "7",
    "a text": '"text"',
    "an empty object": "{}",
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a huge number": '{"a": ' + "9" * 10_000 + "}",
    "two objects": "{}{}",
}
# What may be left out of a folder, or says nothing.
_HARMLESS = {
    ("config_sentence_transformers.json", "an empty object"),
    ("config_sentence_transformers.json", "not there"),
    ("modules.json", "not there"),
}


def _json_files() -> Iterator[Case]:
    for base, file, use in _FILES:
        for name, spoil in damaged_bytes():
            yield _file_case(base, file, name, spoil, use)
        for name, text in _CONTENTS.items():
            yield _file_case(base, file, name, _written(text), use)


def _file_case(base: str, file: str, name: str, spoil: Callable, use: Callable) -> Case:
    harmless = (file, name) in _HARMLESS
    return Case(
        "JSON file",
        f"{base}/{file}: {name}",
        base,
        lambda path: spoil(path / file),
        use,
        control=harmless,
    )


def _written(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text)


_ABSURD: tuple[Any, ...] = ("x", -1, 0, 10**9, [], {}, True, float("nan"))
_DENSE_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_MOE = {
    "num_experts": (*_ABSURD, 3, None),
    "num_experts_per_tok": (*_ABSURD[:7], 3, None),
    "routing": ("x", 1, [], None, True),
    "weight_mode": ("x", 1, [], None, True),
    "target": ("x", 1, "output", None),
    "moe_layers": (5, "all", [], [3], [-1], [0, 0], ["0"], [True], [[0]], {"0": 1}),
    "domains": ("law", 1, ["law"], ["law", "law"], ["law", 1], ["law", ""], None, {}),
    "default_domain": (1, "none", [], True),
    "domain_token_ids": ([], [60], [0, 1], ["60", "61"], None, 5, [61, 60], [True, 61]),
    "domain_token_replaces": ("x", -5, 10**9, [], True),
    "fused_output": ("x", 1, None, []),
    "moe_fast_version": ("99.0", "latest", 1, [], "\x1b[31m", "1; rm -rf ~"),
    "model_type": ("bert", "moe_modernbert", "nobody's", 1, None, []),
}


def _settings() -> Iterator[Case]:
    for base, use in (("dense", embed), ("moe", embed), ("bare", upcycle)):
        for key in _DENSE_SIZES:
            for value in _ABSURD:
                yield _setting(base, key, value, use)
        for value in ("x", 1, [], {}):
            yield _setting(base, "hidden_act", value, use)
        for value in ("x", [], {}, -1):
            yield _setting(base, "layer_norm_eps", value, use)
    for key, values in _MOE.items():
        for value in values:
            yield _setting("moe", key, value, embed)


def _setting(base: str, key: str, value: Any, use: Callable) -> Case:
    def spoil(path: Path) -> None:
        edit(path / "config.json", lambda config: config | {key: value})

    return Case("setting", f"{base}: {key}={value!r}", base, spoil, use, (key, f"/{base}"))


def retyped(change: Callable[[str, torch.Tensor], Any]) -> Callable[[Path], None]:
    """Change each weight; ``None`` leaves it out, a pair renames it."""

    def spoil(path: Path) -> None:
        changed = {}
        for name, value in load_file(path / WEIGHTS).items():
            new = change(name, value)
            if isinstance(new, tuple):
                changed[new[0]] = new[1]
            elif new is not None:
                changed[name] = new.contiguous()
        save_file(changed, path / WEIGHTS, metadata={"format": "pt"})

    return spoil


def _weights() -> Iterator[Case]:
    def header(size: int) -> Callable[[Path], Any]:
        return lambda p: (p / WEIGHTS).write_bytes(struct.pack("<Q", size) + b"{}" * 20)

    def only(part: str, change: Callable) -> Callable[[Path], None]:
        return retyped(lambda n, v: change(n, v) if part in n else v)

    weights = {
        "all renamed": retyped(lambda n, v: ("x." + n, v)),
        "embeddings renamed": only("word_embeddings", lambda n, v: ("embeddings.words", v)),
        "all whole numbers": retyped(lambda n, v: v.to(torch.int8)),
        "all truth values": retyped(lambda n, v: v.bool()),
        "one of whole numbers": only("layer.1.attention.self.query", lambda n, v: v.long()),
        "rows cut off": only("attention.self.query", lambda n, v: v[:-1]),
        "transposed": only("word_embeddings", lambda n, v: v.T),
        "one dimension more": only("attention.self.key", lambda n, v: v[None]),
        "emptied": only("attention.self.value", lambda n, v: v[:0]),
        "a header of 2**62 bytes": header(2**62),
        "a header of 30 bytes": header(30),
        "a header of 0 bytes": header(0),
    }
    for part in ("word_embeddings", "layer.0.", "layer.1.attention", "LayerNorm", "bias"):
        weights[f"without {part}"] = only(part, lambda n, v: None)
    for base, use in (("dense", embed), ("moe", embed), ("bare", upcycle)):
        for name, spoil in weights.items():
            yield Case("weights", f"{base}: {name}", base, spoil, use)
        for name, change in damaged_bytes():
            yield Case(
                "weights",
                f"{base}: file {name}",
                base,
                lambda path, change=change: change(path / WEIGHTS),
                use,
            )
    experts = {
        "no up_proj": only("mlp.up_proj", lambda n, v: None),
        "one expert too few": only("mlp.up_proj", lambda n, v: v[:1]),
        "whole numbers": only("mlp.down_proj", lambda n, v: v.int()),
    }
    for name, spoil in experts.items():
        yield Case("weights", f"experts: {name}", "moe", spoil, embed)

    def disguised(path: Path) -> None:
        edit(path / "config.json", lambda c: c | {"model_type": "bert"})

    for use in (embed, upcycle):
        yield Case("weights", f"a mixture called bert, {use.__name__}", "moe", disguised, use)


def _indexes() -> Iterator[Case]:
    def mapped(change: Callable[[dict], Any]) -> Callable[[Path], Any]:
        return lambda p: edit(p / INDEX, lambda c: c | {"weight_map": change(c["weight_map"])})

    def to(name: Any) -> Callable[[Path], Any]:
        return mapped(lambda m: m | {next(iter(m)): name})

    def shard(path: Path, number: int = 1) -> Path:
        return next(path.glob(f"model-{number:05}-of-*.safetensors"))

    indexes: dict[str, Callable[[Path], Any]] = {
        f"names {name!r}": to(name)
        for name in (
            *("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "", ".", "..", 5),
            *(None, ["x"], "config.json", "a\\b.safetensors", "nothing.safetensors", "\x00", "~"),
        )
    }
    indexes |= {
        "names another shard": mapped(lambda m: dict.fromkeys(m, next(iter(m.values())))),
        "shards swapped": lambda p: shard(p).rename(p / "x") and shard(p, 2).rename(shard(p, 2)),
        "knows one weight": mapped(lambda m: dict([next(iter(m.items()))])),
        "a weight that is nowhere": mapped(lambda m: m | {"none": next(iter(m.values()))}),
        "is a list": mapped(list),
        "of nothing": mapped(lambda m: {}),
        "without a shard": lambda p: shard(p).unlink(),
        "half a shard": lambda p: shard(p).write_bytes(shard(p).read_bytes()[:99]),
        "a shard of zeros": lambda p: shard(p).write_bytes(bytes(500)),
        "one more shard": lambda p: (p / "model-00009-of-00009.safetensors").write_bytes(
            shard(p).read_bytes()
        ),
        "a link to nowhere": lambda p: shard(p).unlink() or shard(p, 2).symlink_to("nowhere"),
        "not there": lambda p: (p / INDEX).unlink(),
    }
    del indexes["shards swapped"], indexes["a link to nowhere"]
    for base, use in (("shards", upcycle), ("moe_shards", load)):
        for name, spoil in indexes.items():
            yield Case("index", f"{base}: {name}", base, spoil, use)


def _modules() -> Iterator[Case]:
    def first(**changes: Any) -> Callable[[Path], Any]:
        return lambda p: edit(p / "modules.json", lambda m: [m[0] | changes, *m[1:]])

    def second(**changes: Any) -> Callable[[Path], Any]:
        return lambda p: edit(p / "modules.json", lambda m: [m[0], m[1] | changes])

    def pooling(**changes: Any) -> Callable[[Path], Any]:
        return lambda p: edit(p / "1_Pooling" / "config.json", lambda c: c | changes)

    spoilt: dict[str, Callable[[Path], Any]] = {}
    for value in ("../moe", "/tmp", "nowhere", 5, None, [], "a\\..\\b"):
        spoilt[f"first path {value!r}"] = first(path=value)
        spoilt[f"second path {value!r}"] = second(path=value)
    for value in ("os.system", "no.such.Module", 5, None, "Transformer", "", "builtins.eval"):
        spoilt[f"second type {value!r}"] = second(type=value)
    for value in (5, "x", -1, None):
        spoilt[f"pooling dimension {value!r}"] = pooling(
            embedding_dimension=value, word_embedding_dimension=value
        )
    spoilt["pooling mode"] = pooling(pooling_mode="x")
    spoilt["a Dense without weights"] = lambda p: (
        edit(
            p / "modules.json",
            lambda m: [*m, m[1] | {"idx": 2, "name": "2", "path": "2_Dense", "type": _DENSE}],
        ),
        (p / "2_Dense").mkdir(),
        (p / "2_Dense" / "config.json").write_text(
            json.dumps({"in_features": 32, "out_features": 8})
        ),
    )
    for name, spoil in spoilt.items():
        yield Case("modules", name, "dense", spoil, embed)


_DENSE = "sentence_transformers.models.Dense"
