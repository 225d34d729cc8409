"""The model card: how a mixture was made, for whoever finds the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fast.files import atomic_write

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
    if config.upcycled_from:
        lines.append(f"- Upcycled from the dense model {inline(config.upcycled_from)}")
    if config.domains:
        lines.append(f"- Domains: {', '.join(map(inline, config.domains))}")
        tokens = "have a token of their own in [CLS]'s place"
        lines.append(f"- Domain tokens: {tokens if config.domain_token_ids else 'none'}")
        default = inline(config.default_domain) if config.default_domain else "none, give one"
        lines.append(f"- Default domain: {default}")
    return "\n".join(lines) + "\n"


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
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
