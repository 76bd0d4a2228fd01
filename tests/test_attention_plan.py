"""What a kernel of attention is told, and how many partitions it has room for, without a GPU."""

import ctypes

import numpy as np
import pytest

import cupy_paged
from cupy_paged import gpu
from cupy_paged.arrays import array
from cupy_paged.attention_kernels import PARAMS, most_partitions, partition_size_of
from support import fake_cupy, ops
from support.bad_calls import NUMPY
from support.data import Case, build
from support.fake_cupy import FakeCuPy
from support.oracle import BlockSparse

LENGTHS = [*range(1, 1100), *(k * 2**15 + d for k in range(1, 7) for d in (-513, -1, 0, 1, 513))]


def test_partitions_are_of_512_tokens_and_more_only_where_there_would_be_more_than_64():
    for seq_len in LENGTHS:
        size = partition_size_of(seq_len)
        assert size == (512 if seq_len < 32768 else 1024 if seq_len < 65536 else 2048)


@pytest.mark.parametrize(
    "capacity", [0, 1, 511, 512, 513, 1024, 32767, 32768, 40000, 65536, 131073, 180000]
)
def test_no_sequence_within_the_capacity_has_more_partitions_than_there_is_room_for(capacity):
    lengths = {n for n in (*LENGTHS, capacity - 1, capacity) if 0 < n <= capacity}
    most = max((-(-n // partition_size_of(n)) for n in lengths), default=1)
    assert most_partitions(capacity) == max(most, 1)


def test_alignment_is_that_of_every_row():
    memory = np.zeros(4 * 5 * 72 + 64, np.float16)
    start = -memory.ctypes.data % 64 // memory.itemsize
    wide = memory[start : start + 4 * 5 * 72].reshape(4, 5, 72)
    for view, dims, row, expected in (
        (wide, range(2), 64, 16),
        (wide[..., :64], range(2), 64, 16),
        (wide[..., 4:68], range(2), 64, 8),
        (wide.reshape(4, -1)[:, :322].reshape(4, 7, 46), range(2), 46, 4),
        (wide.reshape(-1)[: 4 * 357].reshape(4, 357)[:, :320].reshape(4, 5, 64), range(2), 64, 2),
        (wide.reshape(-1)[: 4 * 357].reshape(4, 357)[:1, :320].reshape(1, 5, 64), range(2), 64, 16),
        (np.lib.stride_tricks.as_strided(wide, (1, 5, 64), (2, 144, 2)), range(2), 64, 16),
    ):
        assert array(view, "view").alignment(dims, row) == expected


@pytest.fixture
def launched(monkeypatch):
    """Runs `paged_attention` up to its launch: (fields of the parameters, bytes of new memory)."""
    fake = FakeCuPy()
    packed = []
    fake.launched = lambda address: packed.append(ctypes.string_at(address, PARAMS.size))
    fake.install(monkeypatch)
    gpu.device_limits.cache_clear()

    def run(**given):
        given = {
            name: fake_cupy.ndarray(x) if isinstance(x, np.ndarray) else x
            for name, x in given.items()
        }
        cupy_paged.paged_attention(**given)
        values = PARAMS._struct.unpack(packed.pop(0))
        memory = max((call[3] for call in fake.take() if call[1] == "alloc"), default=0)
        return dict(zip(PARAMS.fields, values, strict=True)), memory

    yield run
    gpu.device_limits.cache_clear()


def strides(x):
    return [stride // x.itemsize for stride in x.strides]


@pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
@pytest.mark.parametrize("sparse", [None, BlockSparse(2, 3, 32, -1, 4)])
def test_the_kernel_is_told_where_everything_is(launched, layout, sparse):
    case = Case("float16", "fp8", layout, 3, 5, 64, 16, (40, 700), sparse=sparse, strides="padded")
    problem = build(case)
    # Rows, heads and table entries each further apart than they are long.
    query = np.zeros((2, 15, 80), np.float16)[..., :64]
    tables = np.zeros((2, 100), np.int32)[:, :70]
    value_cache = np.concatenate([problem.value_cache] * 2)[::2]
    given = ops.arguments(problem, NUMPY, query=query, block_tables=tables, value_cache=value_cache)
    given["value_cache"] = ops.cache_bytes(value_cache)
    out = np.zeros((2, 15, 96), np.float16)[..., :64]
    fields, _ = launched(**given, out=out)

    key_cache = given["key_cache"]
    head, token = {"vllm": (1, None), "HND": (1, 2), "NHD": (2, 1)}[layout]
    for name, cache in (("key_strides", key_cache), ("value_strides", given["value_cache"])):
        assert fields[f"{name}.block"] == strides(cache)[0]
        assert fields[f"{name}.head"] == strides(cache)[head]
        if token is not None:
            assert fields[f"{name}.token"] == strides(cache)[token]
    assert fields["key_strides.block"] != fields["value_strides.block"]
    assert [fields["query_stride_seq"], fields["query_stride_head"]] == strides(query)[:2]
    assert [fields["out_stride_seq"], fields["out_stride_head"]] == strides(out)[:2]
    assert fields["block_tables_stride"] == 100
    sizes = "num_seqs", "num_heads", "num_kv_heads", "group_size"
    assert [fields[name] for name in sizes] == [2, 15, 3, 5]
    assert (fields["max_seq_len"], fields["max_partitions"]) == (70 * 16, 3)
    assert (fields["k_scale"], fields["v_scale"]) == case.scales
    assert fields["scale"] == np.float32(problem.scale)
    if sparse is not None:
        names = "local_blocks", "vert_stride", "block_size", "head_sliding_step"
        assert [fields[f"sparse_{name}"] for name in names] == list(sparse[:4])
        assert fields["tp_rank"] == sparse.tp_rank


@pytest.mark.parametrize("name", ["query", "key_cache", "value_cache", "out"])
def test_strides_past_two_to_the_32_elements_reach_the_kernel_whole(launched, name):
    """Of views that nobody reads here: no memory is so large."""
    far = 2**33 + 64
    given = ops.arguments(build(Case(seq_lens=(40, 17))), NUMPY)
    given["out"] = np.zeros((2, 4, 64), np.float16)
    near = given[name]
    given[name] = np.lib.stride_tricks.as_strided(
        near, near.shape, (far * near.itemsize, *near.strides[1:])
    )
    fields, _ = launched(**given)
    told = {
        "query": "query_stride_seq",
        "key_cache": "key_strides.block",
        "value_cache": "value_strides.block",
        "out": "out_stride_seq",
    }
    assert fields[told[name]] == far


def test_scratch_has_room_for_every_partition_of_every_head(launched):
    problem = build(Case(seq_lens=(40, 17)))
    given = ops.arguments(problem, NUMPY, block_tables=np.zeros((2, 100), np.int32))
    fields, memory = launched(**given, out=np.zeros((2, 4, 64), np.float16))
    num_states = 2 * 4 * fields["max_partitions"]
    assert fields["max_partitions"] == 4
    assert fields["exp_sums"] - fields["tmp_out"] == 4 * 64 * num_states
    assert fields["max_logits"] - fields["exp_sums"] == 4 * num_states
    assert memory == 4 * num_states * (64 + 2)
