"""What there is to draw from: specialisations, and cases of each.

A specialisation is what a kernel is compiled for: dtypes, layout, head and block size, group,
features, strides. To compile takes longer than to run, so there are few of them, spread evenly over
every axis, and case N is one of specialisation N % NUM_SPECIALISATIONS. Both follow from the seed.

Some have sizes that models use or that lie at an edge of a kernel. The others walk through all
there are, each seed from where the one before it has stopped, so that a few seeds meet every one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cupy_paged.layouts import MAX_BLOCK_SIZE, MAX_HEAD_SIZE
from support import cases
from support.data import Case

NUM_SPECIALISATIONS = 150
SHARES = {
    "attention": 80,
    "write": 16,
    "gather": 16,
    "convert_layout": 14,
    "merge": 8,
    "mla": 6,
    "copy": 4,
    "swap": 2,
    "convert_fp8": 4,
}
"""Specialisations of each kind of problem."""

TENSOR_CORES = 44  # of those of attention; any shape may come up in the others
assert sum(SHARES.values()) == NUM_SPECIALISATIONS

HEAD_SIZES = range(8, MAX_HEAD_SIZE + 1, 8)
TENSOR_HEAD_SIZES = range(16, 257, 16)
BLOCK_SIZES = range(1, MAX_BLOCK_SIZE + 1)


class Specialisation(NamedTuple):
    """A kind of problem, and a case whose lengths and seed are still to be drawn."""

    kind: str
    template: Case


@functools.cache
def specialisations(seed: int) -> list[Specialisation]:
    """All specialisations of a seed."""
    found = []
    for number, (kind, count) in enumerate(SHARES.items()):
        key = 100 * seed + 4 * number
        templates = []
        if kind == "attention":
            count -= TENSOR_CORES
            templates = _templates(cases.tensor_cores, TENSOR_CORES, key + 2, TENSOR_HEAD_SIZES)
        templates += _templates(cases.attention, count, key, HEAD_SIZES)
        found += [Specialisation(kind, template) for template in templates]
    return found


def _templates(draw: Callable[..., list[Case]], count: int, key: int, sizes: range) -> list[Case]:
    """A quarter of usual sizes, and the others of whatever sizes it is the seed's turn to have."""

    def no_lengths(block_size: int) -> tuple[int, ...]:
        return ()

    seed, usual = key // 100, count // 4
    drawn = draw(usual, key, no_lengths)
    of_any_size = {
        "head_sizes": _turn(sizes, seed, count - usual),
        "block_sizes": _turn(BLOCK_SIZES, seed, count - usual),
    }
    return drawn + draw(count - usual, key + 1, no_lengths, **of_any_size)


def _turn(sizes: range, seed: int, count: int) -> list[int]:
    """So many sizes, in an order in which neighbours are far apart."""
    order = np.random.default_rng(len(sizes)).permutation(sizes)
    return np.take(order, range(seed * count, (seed + 1) * count), mode="wrap").tolist()


def of_case(seed: int, case: int) -> tuple[Specialisation, np.random.Generator]:
    """The specialisation of a case, and what draws the rest of it."""
    chosen = specialisations(seed)[case % NUM_SPECIALISATIONS]
    return chosen, np.random.default_rng([seed, case])
