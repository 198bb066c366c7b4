"""Randomness is a function of its key and of nothing else, and it is uniform."""

from __future__ import annotations

import subprocess
import sys

import torch

from trainables.randomness import generator, permutation, pick, seed_of


def test_seed_is_a_function_of_the_key_on_every_machine() -> None:
    """A changed number here changes every training ever published: it must not happen unnoticed."""
    assert seed_of("permutation", 0, 1) == 2899390417083511981  # sha256sum of the JSON text, by hand


def test_seed_tells_keys_apart() -> None:
    keys = [(), ("a",), ("a", "b"), ("ab",), ("a", 1), ("a", "1"), ("a", 1.0), (1, "a"), ("a", 1, 1), ("a", 11)]
    seeds = [seed_of(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_does_not_depend_on_the_process() -> None:
    """Python's own hash() of a text differs from process to process."""
    command = "from trainables.randomness import seed_of; print(seed_of('dropout', 3, 'layers.0.q_proj'))"
    said = [
        subprocess.run(
            [sys.executable, "-c", command],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said == [f"{seed_of('dropout', 3, 'layers.0.q_proj')}\n"] * 2


def test_generator_starts_anew_and_leaves_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first = torch.rand(5, generator=generator("x", 1))
    torch.rand(3, generator=generator("y"))
    assert torch.equal(first, torch.rand(5, generator=generator("x", 1)))
    assert not torch.equal(first, torch.rand(5, generator=generator("x", 2)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_permutation_uses_every_row_once_and_differs_by_seed_and_epoch() -> None:
    orders = [permutation(20, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert permutation(20, 0, 1) == orders[1]


def test_pick_is_uniform() -> None:
    """5000 draws of 5: the count of each has a standard deviation of sqrt(5000 x 0.2 x 0.8) = 28; bound: 4 of them."""
    counts = [0] * 5
    for number in range(5000):
        counts[pick(5, "prompt", 0, 0, number)] += 1
    assert sum(counts) == 5000
    assert max(abs(count - 1000) for count in counts) < 4 * 28.3
