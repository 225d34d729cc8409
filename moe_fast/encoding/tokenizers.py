"""A tokenizer that one call has to itself.

A tokenizer of Hugging Face's keeps truncation and padding as its state and sets them anew in each
call, so that two threads with different wishes get each other's, or an error.
"""

from __future__ import annotations

import copy
from typing import Any

from tokenizers import Tokenizer

from moe_fast.compat import replaced_backend

_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def own_tokenizer(tokenizer: Any) -> Any:
    """The same tokenizer with truncation and padding of its own; vocabulary and rules are shared.

    Args:
        tokenizer: of transformers. One that is written in Python keeps no state, and is returned.
    """
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    backend = _own_backend(tokenizer.backend_tokenizer)
    own = copy.copy(tokenizer)
    # Where that means nothing any more, the whole is copied, slowly.
    return own if replaced_backend(own, backend) else copy.deepcopy(tokenizer)


def _own_backend(shared: Tokenizer) -> Tokenizer:
    """Made of the parts of `shared`; only the added tokens are copied, one by one."""
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
    # Ids with gaps between them come out otherwise.
    return own if own.get_added_tokens_decoder() == added else copy.deepcopy(shared)


def _add(tokenizer: Tokenizer, tokens: list[Any]) -> None:
    """Add tokens that are all special or all not."""
    if tokens:
        add = tokenizer.add_special_tokens if tokens[0].special else tokenizer.add_tokens
        add(tokens)
