"""Random streams that are a pure function of their key, independent of Python's hash seed and of other streams."""

from __future__ import annotations

import hashlib
import random


def stream(*key: int | str) -> random.Random:
    """A generator seeded by all parts of `key`; equal keys give equal streams on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "little"))
