"""The model card: how a mixture was made, for whoever finds the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from moe_fast.files import write_text
from moe_fast.models.portable import code_file, is_portable
from moe_fast.version import install_command

if TYPE_CHECKING:
    from moe_fast.models.pretrained import MoEPreTrainedModel

_FRONT_MATTER = """---
library_name: transformers
tags:
- moe_fast
- mixture-of-experts
- {tag}
---

# {title}

<!-- written by moe_fast; remove this line to keep your changes -->

"""

# By a mixture's head, what the hub calls its use.
_TAGS = {
    "": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
}
_OURS = "<!-- written by moe_fast;"
_USE = """
## Use

```python
import moe_fast  # registers the architecture
from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")
```
"""
_LOAD = """\
from transformers import AutoModel

model = AutoModel.from_pretrained("path/to/this/folder", trust_remote_code=True)"""
_PORTABLE = """
## Without moe_fast

The example above needs moe_fast: {moe_fast}.
Where it is not installed, `pip install {packages}` is enough:

```python
{example}
```

`trust_remote_code=True` runs the file `{file}` of this folder: read it first. It computes what
moe_fast computes, but in plain PyTorch, which is slower.
"""


def describe_mixture(config: Any, total: int, active: int) -> str:
    """A Markdown section that says how the mixture was made and how it routes.

    Args:
        config: a moe_fast configuration.
        total, active: parameters of the model, and those that one token visits.
    """
    routed = {
        "enforced": "by the domain (or expert id) given with each text",
        "dense": "to all experts, weighted by a learned router",
    }.get(
        config.routing, f"by a learned router (`{config.routing}`, weights `{config.weight_mode}`)"
    )
    lines = [
        "## Mixture of experts",
        "",
        f"Made with moe_fast {inline(config.moe_fast_version)}: the "
        f"MLPs ({config.target}) of layers {config.moe_layers} are {config.num_experts} experts, "
        f"{config.num_experts_per_tok} of them per token, chosen {routed}.",
        "",
        f"- Architecture: `{config.model_type}`, {total:,} parameters, {active:,} active per token",
    ]
    if config.moe_block == "multi_head":
        lines.append(
            f"- Experts: multi-head blocks, which route each of {config.moe_heads} parts of a "
            "token apart"
        )
    if config.expert_form == "lora":
        lines.append(
            f"- Experts: LoRA, rank {config.lora_rank}, alpha {config.lora_alpha:g}, on one shared "
            "MLP in each layer"
        )
    if config.upcycled_from:
        lines.append(f"- Upcycled from the dense model {inline(config.upcycled_from)}")
    if config.domains:
        lines.append(f"- Domains: {', '.join(map(inline, config.domains))}")
        tokens = "have a token of their own in [CLS]'s place"
        lines.append(f"- Domain tokens: {tokens if config.domain_token_ids else 'none'}")
        default = inline(config.default_domain) if config.default_domain else "none, give one"
        lines.append(f"- Default domain: {default}")
        if config.domain_predictor is not None:
            lines.append('- Unknown domains: `domain="auto"` uses the domain predictor')
    return "\n".join(lines) + "\n"


def describe_portable(
    config: Any, example: str, package: str = "torch", extra: str | None = None
) -> str:
    """A section on loading without moe_fast; empty for a folder that has no code in it.

    Args:
        config: a moe_fast configuration.
        example: lines of Python that load the model.
        package: what pip installs for them beside transformers.
        extra: the extra of moe_fast that does the same.
    """
    if not is_portable(config):
        return ""
    return _PORTABLE.format(
        moe_fast=install_command(extra),
        packages=f"{package} transformers=={transformers.__version__}",
        example=example,
        file=code_file(config),
    )


def inline(text: Any) -> str:
    """Somebody's text as a piece of code in Markdown, in which nothing of it has a meaning."""
    escaped = repr(str(text))[1:-1].replace("`", "'")
    return f"`{escaped}`" if escaped.strip() else "` `"


def has_foreign_card(folder: str | os.PathLike) -> bool:
    """Whether ``folder`` has a ``README.md`` that :func:`write_model_card` did not write."""
    path = Path(folder) / "README.md"
    return path.exists() and _OURS not in path.read_text(encoding="utf-8")


def write_model_card(model: MoEPreTrainedModel, folder: str | os.PathLike) -> None:
    """Write ``README.md`` into ``folder``, unless there is one that this did not write."""
    path = Path(folder) / "README.md"
    if has_foreign_card(folder):
        return
    front = _FRONT_MATTER.format(title=type(model).__name__, tag=_TAGS[model.moe_head])
    text = front + describe_mixture(
        model.config, model.num_parameters(), model.num_parameters(only_active=True)
    )
    text += _USE.format(auto=f"AutoModel{model.moe_head}")
    write_text(path, text + describe_portable(model.config, _LOAD))
