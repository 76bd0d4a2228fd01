"""What is measured: the shapes of attention, by name, and the suites that they form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from cupy_paged.dtypes import itemsize

LAYOUTS = ("vllm", "HND", "NHD")
DTYPES = {
    "bf16": ("bfloat16", "bfloat16"),
    "fp16": ("float16", "float16"),
    "fp8": ("bfloat16", "float8_e4m3fn"),
}
"""Dtypes of query and cache, by the name that the command takes."""


@dataclass(frozen=True)
class Shape:
    name: str
    seq_lens: tuple[int, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16

    @property
    def batch(self) -> int:
        return len(self.seq_lens)

    @property
    def max_seq_len(self) -> int:
        return max(self.seq_lens)

    @property
    def is_ragged(self) -> bool:
        return len(set(self.seq_lens)) > 1

    @property
    def blocks_per_seq(self) -> tuple[int, ...]:
        return tuple(math.ceil(n / self.block_size) for n in self.seq_lens)

    @property
    def default_scale(self) -> float:
        return self.head_size**-0.5

    def kv_bytes(self, dtypes: str) -> int:
        """Bytes of the live keys and values."""
        token = 2 * self.num_kv_heads * self.head_size * itemsize(DTYPES[dtypes][1])
        return sum(self.seq_lens) * token

    def __str__(self) -> str:
        shortest, longest = min(self.seq_lens), max(self.seq_lens)
        length = f"({shortest}..{longest})" if self.is_ragged else f"{longest}"
        block = "" if self.block_size == 16 else f", block {self.block_size}"
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        return f"{self.batch}x{length}, {heads}, {self.head_size}{block}"


class Case(NamedTuple):
    """A shape with its dtypes: one set of data, measured in several layouts."""

    suite: str
    shape: Shape
    dtypes: str
    layouts: tuple[str, ...]


def _ragged_lengths() -> tuple[int, ...]:
    # The seed whose draw comes nearest to the bytes behind the published times of this shape.
    return tuple(np.random.default_rng(2).integers(16, 4097, 256).tolist())


def _long_tail_lengths() -> tuple[int, ...]:
    """Most sequences a few hundred tokens, a few of them tens of thousands."""
    lengths = 128 * (1 + np.random.default_rng(0).pareto(0.9, 128))
    return tuple(np.minimum(lengths, 65536).astype(int).tolist())


ANCHORS = (
    Shape("b1_8k", (8192,)),
    Shape("b1_128k", (131072,)),
    Shape("b8_4k", (4096,) * 8),
    Shape("b64_2k", (2048,) * 64),
    Shape("b128_1k", (1024,) * 128),
    Shape("b256_rag", _ragged_lengths()),
    Shape("b32_mha", (4096,) * 32, num_kv_heads=32),
    Shape("b32_g8", (8192,) * 32, num_heads=64),
    Shape("b64_d64", (4096,) * 64, head_size=64),
    Shape("b32_d256", (4096,) * 32, num_heads=16, num_kv_heads=4, head_size=256),
)
FP8_ANCHORS = ("b1_8k", "b1_128k", "b8_4k", "b64_2k", "b256_rag", "b32_g8")

BASE = Shape("base", (2048,) * 32)
WIDE = (
    BASE,
    *(replace(BASE, name=f"gqa{n}", num_heads=8 * n) for n in (1, 3, 7, 8, 16)),
    *(replace(BASE, name=f"head{n}", head_size=n) for n in (64, 80, 256)),
    *(replace(BASE, name=f"block{n}", block_size=n) for n in (8, 32, 64, 128)),
    *(replace(BASE, name=f"batch{n}", seq_lens=(2048,) * n) for n in (1, 4, 16, 128, 512)),
    Shape("long_tail", _long_tail_lengths()),
    Shape("b1_1m", (1 << 20,)),
)
"""One thing changed at a time; the base has 4 query heads a KV head, as has most of the rest."""


def anchors(dtypes: Sequence[str] = (), layouts: Sequence[str] = ()) -> list[Case]:
    return [
        Case("anchors", shape, kind, tuple(layouts or LAYOUTS))
        for kind in dtypes or ("bf16", "fp8")
        for shape in ANCHORS
        if kind != "fp8" or shape.name in FP8_ANCHORS
    ]


def wide(dtypes: Sequence[str] = (), layouts: Sequence[str] = ()) -> list[Case]:
    """Where dtypes or layouts are given, every shape has all of them."""
    cases = [
        Case("wide", shape, kind, tuple(layouts or (LAYOUTS if shape is BASE else ("HND",))))
        for kind in dtypes or ("bf16",)
        for shape in WIDE
    ]
    if not dtypes:
        cases[1:1] = [Case("wide", BASE, kind, cases[0].layouts) for kind in ("fp16", "fp8")]
    return cases


SUITES = {"anchors": anchors, "wide": wide}


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns; without patterns, every name does."""
    return not globs or any(fnmatchcase(name, glob) for glob in globs)
