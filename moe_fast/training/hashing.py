"""Hashes texts to integers that are the same in every process, on every machine, in every run."""

from __future__ import annotations

from hashlib import blake2b


def stable_hash(text: str) -> int:
    """Returns a signed 64-bit integer: the first 8 bytes of BLAKE2b of the UTF-8 text.

    Python's own ``hash`` differs between processes, so that a worker's duplicates would not be
    found. Lone surrogates, which real files contain, are hashed too.
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
