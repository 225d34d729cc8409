"""nomic-embed-text-v2-moe itself: read, asked for the similarity on its card, and written back.

    python -m experiments.try_nomic [FOLDER]

Needs the network (1.9 GB), or FOLDER with the model, and about 8 GB of memory and 6 GB of disk. No
code of the model's is run. Ends with an error where a number or a bit differs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

import moe_fast

MODEL = "nomic-ai/nomic-embed-text-v2-moe"
FILES = ["*.json", "*.safetensors", "*.model"]
# From the card, https://huggingface.co/nomic-ai/nomic-embed-text-v2-moe
TEXTS = ["Hello!", "¡Hola!"]
SIMILARITY = 0.9118


def try_model(folder: Path) -> None:
    """Read, encode and export the model in ``folder``, printing what was found.

    Raises:
        SystemExit: where the similarity is not the card's, or an export differs from its source.
    """
    model = moe_fast.import_nomic(folder)
    print(f"{model.transformers_model.num_parameters():,} parameters")
    first, second = model.encode(TEXTS, prompt_name="passage", convert_to_tensor=True)
    similarity = float(torch.cosine_similarity(first, second, dim=0))
    print(f"similarity {similarity:.6f}, on the card {SIMILARITY}")
    with tempfile.TemporaryDirectory() as temporary:
        exported = Path(temporary, "exported")
        moe_fast.export_nomic(model, exported)
        differ = differences(folder, exported)
    print(f"differences behind the export: {', '.join(differ) or 'none'}")
    if differ or abs(similarity - SIMILARITY) > 1e-4:
        raise SystemExit("moe_fast does not read this model as its authors do.")


def differences(one: Path, other: Path) -> list[str]:
    """The names of settings and weights that are not the same, bit for bit, in two folders."""
    configs = [json.loads((f / "config.json").read_text(encoding="utf-8")) for f in (one, other)]
    found = [k for k in configs[0] | configs[1] if configs[0].get(k) != configs[1].get(k)]
    paths = [str(folder / "model.safetensors") for folder in (one, other)]
    with safe_open(paths[0], "pt") as a, safe_open(paths[1], "pt") as b:
        names = [set(file.keys()) for file in (a, b)]
        found += sorted(names[0] ^ names[1])
        for name in sorted(names[0] & names[1]):
            if not torch.equal(a.get_tensor(name), b.get_tensor(name)):
                found.append(name)
    return found


if __name__ == "__main__":
    given = sys.argv[1:]
    try_model(Path(given[0] if given else snapshot_download(MODEL, allow_patterns=FILES)))
