"""ServerSettings: the model that a server offers, and its limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_fast.ops.checks import check_choice, check_count


@dataclass(frozen=True)
class ServerSettings:
    """What a server offers, and what it refuses.

    Attributes:
        model: folder or hub id of a sentence-transformers model; a mixture or a dense one.
        name: the name by which requests ask for it; ``None``: ``model`` itself, of a folder its
            last part.
        dtype: the dtype to compute in, "float32", "bfloat16" or "float16"; ``None``: as saved.
        device: a device as in PyTorch; ``None``: a GPU if there is one, else the CPU.
        threads: PyTorch's threads; ``None``: PyTorch's default.
        truncate: whether texts of more tokens than ``max_seq_length`` are cut if the request does
            not say. Otherwise such a text is an error.
        max_batch_tokens: the most tokens in one forward pass; a longer text is computed alone.
        max_wait: seconds that a batch waits for further requests while several clients are busy; a
            single client's request never waits.
        max_texts: the most texts in a request.
        max_body_bytes: the most bytes in a request.
        max_queue_tokens: further requests are refused (429) while this many tokens wait.
        timeout: seconds after which a request ends with an error (503).
        body_timeout: seconds within which a request's body must arrive.
    """

    model: str
    name: str | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    truncate: bool = False
    max_batch_tokens: int = 8192
    max_wait: float = 0.002
    max_texts: int = 2048
    max_body_bytes: int = 16 << 20
    max_queue_tokens: int = 1 << 18
    timeout: float = 60.0
    body_timeout: float = 10.0

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, (None, "float32", "bfloat16", "float16"))
        for name in ("max_batch_tokens", "max_texts", "max_body_bytes", "max_queue_tokens"):
            check_count(name, getattr(self, name))
        check_count("threads", 1 if self.threads is None else self.threads)
        for name, least in (("max_wait", 0.0), ("timeout", 1e-3), ("body_timeout", 1e-3)):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and least <= value < math.inf):
                raise ValueError(
                    f"{name} must be a finite number of seconds, at least {least:g}; got {value!r}"
                )
