"""Random problems of the operators that write, gather, convert, copy and merge."""

from dataclasses import replace
from typing import Any

import numpy as np

import cupy_paged
from support import (
    block_suite,
    cache_suite,
    compare,
    gather_suite,
    layout_suite,
    merge_suite,
    ops,
    oracle,
)
from support.data import DTYPES, Case, empty_caches, random_bits

FLOATS = "float16", "bfloat16", "float32"


def _moved(template: Case, rng: np.random.Generator) -> Case:
    """The case of a template with another number of KV heads, which kernels take as it comes."""
    return replace(template, num_kv_heads=int(rng.integers(1, 6)), sparse=None, alibi=False)


def _num_blocks(case: Case, rng: np.random.Generator) -> int:
    of_block = case.num_kv_heads * case.block_size * case.head_size
    return int(rng.integers(1, max(2**19 // of_block, 3)))


def write(template: Case, arrays: Any, rng: np.random.Generator) -> None:
    case = _moved(template, rng)
    num_blocks = min(_num_blocks(case, rng), 20)
    num_tokens = int(rng.integers(0, min(num_blocks * case.block_size, 60) + 1))
    key, value = cache_suite.tokens(rng, case, num_tokens, width=float(rng.choice([1.0, 40.0])))
    slots = cache_suite.slots(
        rng, case, num_tokens - int(rng.integers(2) * (num_tokens > 3)), num_blocks
    )
    cache_suite.check(case, key, value, empty_caches(case, num_blocks, rng), slots, arrays)


def gather(template: Case, arrays: Any, rng: np.random.Generator) -> None:
    case = _moved(template, rng)
    count = int(rng.integers(1, 7))
    longest = max(min(2**17 // (case.num_kv_heads * case.head_size), 200), 10)
    lengths = rng.integers(0, longest // count + 1, count).tolist()
    starts = rng.integers(0, 3 * case.block_size, count).tolist()
    to, given = None, {}
    if case.kv_cache_dtype != "auto" and case.head_size % 16 == 0:
        to = case.dtype
        given = {"k_scale": case.scales[0], "v_scale": case.scales[1]}
    spare = int(rng.choice([5, 0, -min(sum(lengths), 9)]))
    gather_suite.GatherSuite().check(
        arrays, rng, case, to, starts, lengths, spare, gap=16 // case.cache_dtype.itemsize, **given
    )


def convert_layout(template: Case, arrays: Any, rng: np.random.Generator) -> None:
    case = _moved(template, rng)
    others = [name for name in ("vllm", "HND", "NHD") if name != case.layout]
    # One of them for all cases: kernels are compiled for both layouts.
    new_layout = others[case.head_size // 8 % 2]
    if case.kv_cache_dtype != "auto" and case.head_size % 16:
        new_layout = "NHD" if case.layout == "HND" else "HND"
    num_blocks = min(_num_blocks(case, rng), 12)
    layout_suite.LayoutSuite().check(arrays, rng, case, new_layout, num_blocks)


def merge(template: Case, arrays: Any, rng: np.random.Generator) -> None:
    num_heads = int(rng.integers(1, 10))
    num_tokens = int(rng.integers(0, 120))
    states = merge_suite.states(
        rng, template.dtype, num_tokens, num_heads, template.head_size,
        spread=float(rng.choice([0.5, 3.0, 60.0])),
    )  # fmt: skip
    if rng.random() < 0.7:
        merge_suite.empty_some(rng, states)
    with_context = None if rng.random() < 0.5 else int(rng.integers(0, num_tokens + 1))
    merge_suite.check(states, arrays, template.dtype, with_context)


def mla(template: Case, arrays: Any, rng: np.random.Generator) -> None:
    rank, pe_dim = ((512, 64), (64, 16), (8 * int(rng.integers(1, 9)), 8))[rng.integers(3)]
    cache_suite.MlaSuite().check(
        arrays, rng, template.dtype, template.kv_cache_dtype, rank, pe_dim, gap=16
    )


def copy(template: Case, arrays: Any, rng: np.random.Generator) -> None:
    num_blocks, num_bytes = int(rng.integers(2, 40)), int(2 ** rng.uniform(0, 13))
    owners = [
        random_bits(rng, (num_blocks, 3, num_bytes), np.uint8) for _ in range(rng.integers(1, 5))
    ]
    mapping = block_suite.pairs(rng, num_blocks, int(rng.integers(0, num_blocks // 2 + 1)))
    given = {"mapping": mapping} if rng.random() < 0.5 else {}
    block_suite.CopyBlocksSuite().check(arrays, owners, [], mapping, **given)


def swap(template: Case, arrays: Any, rng: np.random.Generator) -> None:
    """Between two arrays in the same place; only a GPU's may go to and from the host."""
    num_blocks, num_bytes = int(rng.integers(2, 60)), int(2 ** rng.uniform(0, 13))
    sides = random_bits(rng, (2, num_blocks, num_bytes), np.uint8)
    source, destination = map(arrays.array, sides)
    mapping = np.stack([rng.integers(0, num_blocks, num_blocks), rng.permutation(num_blocks)], 1)
    mapping = mapping[: rng.integers(num_blocks + 1)]
    cupy_paged.swap_blocks(source, destination, mapping)
    expected = sides[1].copy()
    expected[mapping[:, 1]] = sides[0][mapping[:, 0]]
    compare.bitwise(arrays.numpy(destination), expected, "destination")
    compare.bitwise(arrays.numpy(source), sides[0], "source")


def convert_fp8(template: Case, arrays: Any, rng: np.random.Generator) -> None:
    kv_dtype, scale = template.kv_cache_dtype, float(rng.choice([1.0, 0.37, 3.0, 300.0]))
    kv_dtype = "fp8" if kv_dtype == "auto" else kv_dtype
    shape = int(rng.integers(0, 20)), int(rng.integers(1, 3000))
    if rng.random() < 0.5:
        values = _normal(random_bits(rng, shape, DTYPES[template.dtype]))
        output = arrays.array(np.zeros(shape, np.uint8))
        cupy_paged.convert_fp8(output, arrays.array(values), scale, kv_dtype)
        expected = oracle.quantise(values, scale, kv_dtype)
        compare.bitwise(arrays.numpy(output).view(expected.dtype), expected, any_nan=True)
        return
    codes = random_bits(rng, shape, np.uint8)
    output = ops.empty(shape, template.dtype, arrays, ops.SENTINEL)
    cupy_paged.convert_fp8(output, arrays.array(codes), scale, kv_dtype)
    with np.errstate(over="ignore"):
        values = codes.view(oracle.FP8[kv_dtype]).astype(np.float32) * np.float32(scale)
        expected = values.astype(DTYPES[template.dtype])
    compare.bitwise(arrays.numpy(output), expected, any_nan=True)


def _normal(values: np.ndarray) -> np.ndarray:
    """`values` with zeros for subnormal float32, which kernels take them for."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        subnormal = np.abs(values.astype(np.float32)) < np.finfo(np.float32).tiny
    values[subnormal] = 0
    return values


CHECKS = {
    "write": write,
    "gather": gather,
    "convert_layout": convert_layout,
    "merge": merge,
    "mla": mla,
    "copy": copy,
    "swap": swap,
    "convert_fp8": convert_fp8,
}
