"""A tokenizer for one call alone.

A tokenizer of Hugging Face stores truncation and padding as its state and sets them in each call.
Two threads that need different settings would get each other's, or an error.
"""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import Tokenizer

from moe_fast.compat import replaced_backend

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def own_tokenizer(tokenizer: Any) -> Any:
    """A copy with its own truncation and padding settings; vocabulary and rules are shared.

    Args:
        tokenizer: one of transformers'. One written in Python has no such state and is returned
            itself.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    backend = _own_backend(tokenizer.backend_tokenizer)
    own = copy.copy(tokenizer)
    # If transformers no longer uses the replaced backend, everything is copied, which is slow.
    return own if replaced_backend(own, backend) else copy.deepcopy(tokenizer)


def _own_backend(shared: Tokenizer) -> Tokenizer:
    """A tokenizer with the parts of `shared`; only the added tokens are copied, one by one."""
    own = Tokenizer(shared.model)
    for name in _PARTS:
        part = getattr(shared, name)
        if part is not None:
            setattr(own, name, part)
    own.encode_special_tokens = shared.encode_special_tokens
    added = shared.get_added_tokens_decoder()
    run: list[Any] = []
    for _, token in sorted(added.items()):
        if run and run[-1].special != token.special:
            _add(own, run)
            run = []
        run.append(token)
    _add(own, run)
    # If there are gaps between the ids, the copied tokens get other ids.
    return own if own.get_added_tokens_decoder() == added else copy.deepcopy(shared)


def _add(tokenizer: Tokenizer, tokens: list[Any]) -> None:
    """Add tokens, which are either all special or all not special."""
    if tokens:
        add = tokenizer.add_special_tokens if tokens[0].special else tokenizer.add_tokens
        add(tokens)
