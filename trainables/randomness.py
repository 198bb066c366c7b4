"""Counter-based randomness: every random thing is a function of names and numbers, never of what ran before.

So results depend neither on batching nor on packing nor on restarts, and resuming needs no generator states.
"""

from __future__ import annotations

import hashlib
import json

import torch

Key = str | int | float


def seed_of(*key: Key) -> int:
    """63-bit seed from a key: the first 8 bytes of sha256 over its JSON, without the sign bit."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for this key. CPU and CUDA generators of one key give different numbers."""
    return torch.Generator(device=device).manual_seed(seed_of(*key))


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which ``count`` rows are used in ``epoch``."""
    order: list[int] = torch.randperm(count, generator=generator("permutation", seed, epoch)).tolist()
    return order


def pick(count: int, *key: Key) -> int:
    """A uniform choice of ``range(count)``; the bias of the remainder is below count / 2**63."""
    return seed_of("pick", *key) % count
