"""Hashes texts to integers that are the same in every process, on every machine, in every run."""

from __future__ import annotations

from hashlib import blake2b


def stable_hash(text: str) -> int:
    """Return a signed 64-bit integer: the BLAKE2b digest, of 8 bytes, of the text in UTF-8.

    Python's own ``hash`` differs between processes, so that duplicates across data loader workers
    would not be found. Lone surrogates, which occur in real files, are hashed too.
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
