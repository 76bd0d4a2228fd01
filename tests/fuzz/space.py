"""What there is to draw from: specialisations, and cases of each.

A specialisation is what a kernel is compiled for: dtypes, layout, head and block size, group,
features, strides. To compile takes longer than to run, so there are few of them, spread evenly over
every axis, and case N is one of specialisation N % NUM_SPECIALISATIONS. Both follow from the seed.
"""

import functools
from typing import NamedTuple

import numpy as np

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


class Specialisation(NamedTuple):
    """A kind of problem, and a case whose lengths and seed are still to be drawn."""

    kind: str
    template: Case


@functools.cache
def specialisations(seed: int) -> list[Specialisation]:
    """All specialisations of a seed."""

    def no_lengths(block_size: int) -> tuple[int, ...]:
        return ()

    found = []
    for number, (kind, count) in enumerate(SHARES.items()):
        key = 100 * seed + 2 * number
        if kind == "attention":
            blocks = cases.TENSOR_BLOCK_SIZES
            templates = cases.tensor_cores(TENSOR_CORES, key + 1, no_lengths, blocks)
            templates += cases.attention(count - TENSOR_CORES, key, no_lengths)
        else:
            templates = cases.attention(count, key, no_lengths)
        found += [Specialisation(kind, template) for template in templates]
    return found


def of_case(seed: int, case: int) -> tuple[Specialisation, np.random.Generator]:
    """The specialisation of a case, and what draws the rest of it."""
    chosen = specialisations(seed)[case % NUM_SPECIALISATIONS]
    return chosen, np.random.default_rng([seed, case])
