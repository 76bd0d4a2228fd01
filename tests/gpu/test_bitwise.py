"""A row's bits depend on that row alone: not on the batch, the operator, the run, the placement."""

from dataclasses import replace

import numpy as np
import pytest

from cupy_paged import gpu
from support import compare, frameworks, ops, thread_blocks
from support.data import Case, build

CUPY = frameworks.device()[0]
SPECIAL = 1, 16, 511, 512, 513, 1024, 3000, 20001, 32767, 32768, 70000
BATCH = 256
CALLS = ops.paged_attention, ops.paged_attention_v1, ops.paged_attention_v2
CASES = [
    Case("float16", "auto", "vllm", 1, 8),
    Case("bfloat16", "auto", "HND", 2, 4, head_size=128),
    Case("float32", "auto", "NHD", 1, 3),
    Case("bfloat16", "fp8", "vllm", 1, 8, head_size=128),
    Case("float16", "fp8_e5m2", "NHD", 2, 1, alibi=True),
    Case("bfloat16", "auto", "vllm", 1, 7, head_size=256),
    Case("float16", "auto", "HND", 1, 16, head_size=80),
]


def ragged(case):
    """BATCH rows, the special lengths first and then short ones, and the caches on the device."""
    short = np.random.default_rng(3).integers(0, 700, BATCH - len(SPECIAL))
    problem = build(replace(case, seq_lens=(*SPECIAL, *short.tolist())))
    return problem, {
        "key_cache": CUPY.array(ops.cache_bytes(problem.key_cache)),
        "value_cache": CUPY.array(ops.cache_bytes(problem.value_cache)),
    }


@pytest.fixture(params=CASES, ids=str, scope="module")
def loaded(request):
    return ragged(request.param)


def same_bits(found, expected, what):
    for got, want in zip(found, expected, strict=True):
        compare.bitwise(got, want, what)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_row_has_the_same_bits_in_any_batch(call, loaded, tally):
    problem, caches = loaded
    rng = np.random.default_rng(7)
    expected = call(problem, CUPY, **caches)
    special = range(len(SPECIAL))
    batches = [[row] for row in special]
    for size in 2, 17, BATCH:
        for position in {0, size // 2, size - 1}:
            row = int(rng.choice(special))
            others = rng.permutation([r for r in range(BATCH) if r != row])[: size - 1].tolist()
            batches.append([*others[:position], row, *others[position:]])
    for batch in batches:
        found = call(problem.rows(batch), CUPY, **caches)
        what = f"{call.__name__} of rows {batch}, of lengths {problem.seq_lens[batch].tolist()}"
        same_bits(found, [array[batch] for array in expected], what)
        tally("rows in other batches", len(batch))


def partition_size(seq_len):
    """What the docstring of paged_attention_v2 says of paged_attention."""
    return 512 if seq_len < 32768 else 1024 if seq_len < 65536 else 2048


def test_every_operator_gives_the_same_bits(loaded):
    problem, caches = loaded
    out, _ = ops.paged_attention(problem, CUPY, **caches)
    compare.bitwise(ops.paged_attention_v1(problem, CUPY, **caches)[0], out, "v1")
    sizes = np.array([partition_size(seq_len) for seq_len in problem.seq_lens])
    for size in 512, 1024, 2048:
        needed = ops.partitions_needed(problem, size)
        found, *_ = ops.paged_attention_v2(problem, CUPY, needed, partition_size=size, **caches)
        assert (sizes == size).any()
        compare.bitwise(found[sizes == size], out[sizes == size], f"v2 with {size}")


@pytest.mark.parametrize("max_blocks", [1, 7, 61])
def test_a_smaller_device_gives_the_same_bits(max_blocks, loaded):
    problem, caches = loaded
    expected = [call(problem, CUPY, **caches) for call in CALLS]
    with thread_blocks.at_most(max_blocks):
        for call, want in zip(CALLS, expected, strict=True):
            same_bits(call(problem, CUPY, **caches), want, call.__name__)


def test_many_runs_give_the_same_bits(loaded, tally):
    problem, caches = loaded
    for call in CALLS:
        first = call(problem, CUPY, **caches)
        runs = 250 if call is ops.paged_attention else 50
        for run in range(runs):
            same_bits(call(problem, CUPY, **caches), first, f"{call.__name__}, run {run}")
        tally("repeated runs", runs)


def test_estimates_and_widths_change_no_bit(loaded):
    problem, caches = loaded
    wide = np.pad(problem.block_tables, ((0, 0), (0, 33)), constant_values=-1)
    for call in CALLS[:2]:
        expected = call(problem, CUPY, **caches)
        for changed in (
            replace(problem, max_seq_len=70000),
            replace(problem, max_seq_len=10**6),
            replace(problem, block_tables=wide),
        ):
            same_bits(call(changed, CUPY, **caches), expected, call.__name__)


def test_spare_partitions_change_no_bit(loaded):
    problem, caches = loaded
    out, *_ = ops.paged_attention_v2(problem, CUPY, **caches)
    spare = ops.partitions_needed(problem) + 7
    again, *_ = ops.paged_attention_v2(problem, CUPY, spare, partition_size=512, **caches)
    compare.bitwise(again, out)


def test_estimates_change_no_bit_with_scratch_kept_for_any_batch(loaded):
    problem, caches = loaded
    out, *_ = ops.paged_attention_v2(problem, CUPY, 160, partition_size=512, **caches)
    for max_seq_len in 70000, 70001, 75000, 160 * 512:
        estimated = replace(problem, max_seq_len=max_seq_len)
        again, *_ = ops.paged_attention_v2(estimated, CUPY, 160, **caches)
        compare.bitwise(again, out, f"max_seq_len {max_seq_len}")


def test_the_placement_of_blocks_changes_no_bit(loaded):
    problem, caches = loaded
    num_blocks = len(problem.key_cache)
    order = np.random.default_rng(5).permutation(num_blocks)
    where = np.argsort(order).astype(np.int32)
    live = (problem.block_tables >= 0) & (problem.block_tables < num_blocks)
    tables = np.where(live, where[np.where(live, problem.block_tables, 0)], problem.block_tables)
    moved = replace(
        problem,
        key_cache=problem.key_cache[order],
        value_cache=problem.value_cache[order],
        block_tables=tables,
    )
    same_bits(ops.paged_attention(moved, CUPY), ops.paged_attention(problem, CUPY, **caches), "out")


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_paths_of_older_chips_keep_the_contract(case, monkeypatch):
    monkeypatch.setattr(gpu, "emulated_sm", lambda: 75)
    problem, caches = loaded = ragged(case)
    test_every_operator_gives_the_same_bits(loaded)
    expected = ops.paged_attention(problem, CUPY, **caches)
    for row in range(len(SPECIAL)):
        alone = ops.paged_attention(problem.rows([row]), CUPY, **caches)
        same_bits(alone, [array[[row]] for array in expected], f"length {SPECIAL[row]}")
