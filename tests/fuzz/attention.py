"""Random attention problems: needles in poisoned pools, every operator, against the oracle."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from support import compare, ops, thread_blocks
from support.data import DTYPES, Case, Problem, build, store, write

MAX_ELEMENTS = 2**18  # of a case's keys, but for the long ones
LONG_CASES = 1 / 20  # of those with few enough channels
LONG = 32768, 65536  # tokens from which partitions are larger
MOST_THREAD_BLOCKS = None, None, 1, 3, 7


@dataclass(frozen=True)
class ScaledCase(Case):
    """A case with scales of its own."""

    fp8_scales: tuple[float, float] = (1.0, 1.0)

    @property
    def scales(self) -> tuple[float, float]:
        return self.fp8_scales if self.kv_cache_dtype != "auto" else (1.0, 1.0)


def draw(template: Case, rng: np.random.Generator) -> Problem:
    """A problem of a template, a needle in each of its sequences."""
    case = ScaledCase(
        **{
            **template.__dict__,
            "seq_lens": _lengths(template, rng),
            "seed": int(rng.integers(2**31)),
            "fp8_scales": tuple(float(s) for s in rng.choice([0.25, 0.7, 1.0, 1.6], 2)),
        }
    )
    problem = build(case)
    for seq in range(len(case.seq_lens)):
        _plant(problem, seq, rng)
    longest = max(case.seq_lens, default=0)
    estimates = None, longest, longest + int(rng.integers(1, 2000)), 2**40
    problem = replace(problem, max_seq_len=estimates[rng.integers(len(estimates))])
    _spoil_lengths(problem, rng)
    return problem


def _lengths(template: Case, rng: np.random.Generator) -> tuple[int, ...]:
    width = template.num_kv_heads * template.head_size
    # A bias of a thousand leaves float32 logits as far apart as results may be off.
    may_be_long = width <= 128 and template.group <= 16 and not template.alibi
    if may_be_long and rng.random() < LONG_CASES:
        long = int(rng.choice(LONG)) + int(rng.integers(-40, 40))
        return tuple(rng.permutation([long, int(rng.integers(100))]).tolist())
    longest = max(min(MAX_ELEMENTS // width, 3000), 40)
    edges = [0, 1, *_around(template.block_size, longest), *_around(512, longest)]
    count = int(rng.integers(1, 6)) if rng.random() < 0.97 else 0
    drawn = np.where(
        rng.random(count) < 0.5,
        rng.choice(edges, count),
        (longest + 1) ** rng.random(count),  # as many short ones as long ones
    )
    return tuple(int(n) for n in drawn)


def _around(size: int, longest: int) -> list[int]:
    """The numbers next to multiples of a size."""
    multiples = range(size, longest, size)
    return [n + d for n in multiples for d in (-1, 0, 1) if n + d <= longest]


def _plant(problem: Problem, seq: int, rng: np.random.Generator) -> None:
    """Has one token, at an edge more often than not, answer all queries of a sequence."""
    case, seq_len = problem.case, problem.case.seq_lens[seq]
    if seq_len == 0:
        return
    edges = {0, seq_len - 1, *_around(case.block_size, seq_len - 1), *_around(512, seq_len - 1)}
    token = int(rng.choice(sorted(edges)) if rng.random() < 0.8 else rng.integers(seq_len))
    direction = rng.standard_normal((case.num_kv_heads, 1, case.head_size))
    queries = direction + 0.1 * rng.standard_normal((case.num_kv_heads, case.group, case.head_size))
    problem.query[seq] = queries.reshape(case.num_heads, -1).astype(DTYPES[case.dtype])
    wanted = np.log(seq_len) + 4.0
    key = direction[:, 0] * wanted / (problem.scale * np.sum(direction[:, 0] ** 2, -1)[:, None])
    caches, table = (problem.key_cache, problem.value_cache), problem.block_tables[seq]
    value = problem.dense[seq][1][token : token + 1]
    write(case, *caches, table, token, store(key, case, case.scales[0])[None], value)


def _spoil_lengths(problem: Problem, rng: np.random.Generator) -> None:
    """Has a row, now and then, be padding, or longer than its table."""
    if problem.case.seq_lens and rng.random() < 0.1:
        row = rng.integers(len(problem.seq_lens))
        too_long = problem.capacity + int(rng.integers(1, 5000))
        problem.seq_lens[row] = rng.choice([-1, -(2**31), too_long, 2**31 - 1])


def check(problem: Problem, arrays: Any, rng: np.random.Generator, scratch: str) -> None:
    """Checks one operator, drawn at random, on a problem, and on few thread blocks at times."""
    with thread_blocks.at_most(MOST_THREAD_BLOCKS[rng.integers(len(MOST_THREAD_BLOCKS))]):
        _OPERATORS[rng.integers(len(_OPERATORS))](problem, arrays, rng, scratch)


def _paged_attention(problem: Problem, arrays: Any, rng: np.random.Generator, scratch: str) -> None:
    out, lse = ops.paged_attention(problem, arrays)
    compare.close(out, problem.expected[0], problem.case.dtype, "out of paged_attention")
    compare.close_lse(lse, problem.expected[1], "lse of paged_attention")
    if problem.case.seq_lens and rng.random() < 0.2:
        row = int(rng.integers(len(problem.seq_lens)))
        alone, alone_lse = ops.paged_attention(problem.rows([row]), arrays)
        compare.bitwise(alone[0], out[row], f"row {row} alone", any_nan=True)
        compare.bitwise(alone_lse[0], lse[row], f"lse of row {row} alone", any_nan=True)


def _paged_attention_v1(
    problem: Problem, arrays: Any, rng: np.random.Generator, scratch: str
) -> None:
    if not arrays.writable:
        return _paged_attention(problem, arrays, rng, scratch)
    (out,) = ops.paged_attention_v1(problem, arrays)
    return compare.close(out, problem.expected[0], problem.case.dtype, "out of paged_attention_v1")


def _paged_attention_v2(
    problem: Problem, arrays: Any, rng: np.random.Generator, scratch: str
) -> None:
    if not arrays.writable:
        return _paged_attention(problem, arrays, rng, scratch)
    # What is left of a sequence that is too long is not specified, and an estimate that no scratch
    # can hold is refused.
    problem = replace(problem, max_seq_len=None)
    size = int(rng.choice([16, 48, 128, 512, 512, 1024, 2048]))
    size = max(size, -(-problem.capacity // (64 * 16)) * 16)  # or the oracle would take long
    num_partitions = ops.partitions_needed(problem, size) + int(rng.integers(3))
    if (problem.seq_lens > problem.capacity).any() or not problem.case.seq_lens:
        out, *_ = ops.paged_attention_v2(
            problem, arrays, num_partitions, scratch, partition_size=size
        )
        return compare.close(out, problem.expected[0], problem.case.dtype, "out of v2")
    return ops.check_scratch(problem, arrays, size, num_partitions, scratch)


_OPERATORS: list[Callable[[Problem, Any, np.random.Generator, str], None]] = [
    _paged_attention,
    _paged_attention,
    _paged_attention_v1,
    _paged_attention_v2,
]
