"""Random numbers keyed by what they are for, never by the process that draws them."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of the key, e.g. ("noise", seed, iteration, slot, index).

    CPU, so that a sample has the same noise on every device and rank.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
