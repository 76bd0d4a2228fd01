"""The attention operators on a GPU, against the oracle."""

import pytest

from cupy_paged import gpu
from support import cases, frameworks, ops, thread_blocks
from support.attention_suite import AttentionSuite
from support.data import Case, build, needles

CUPY = frameworks.device()[0]
STORAGES = pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "layout"),
    [
        ("float16", "auto", "vllm"),
        ("bfloat16", "auto", "NHD"),
        ("float32", "auto", "HND"),
        ("bfloat16", "fp8", "HND"),
    ],
)


@pytest.fixture
def older_chip(monkeypatch):
    """The code paths of a Turing: software bfloat16 and float8, plain copies."""
    monkeypatch.setattr(gpu, "emulated_sm", lambda: 75)


@pytest.fixture
def ampere(monkeypatch):
    """The code paths of an A100: tensor cores and asynchronous copies, but software float8."""
    monkeypatch.setattr(gpu, "emulated_sm", lambda: 80)


@pytest.fixture
def small_memory(monkeypatch):
    """Blackwell's smaller chips: bulk copies with little shared memory, so sums in small steps."""
    monkeypatch.setattr(gpu, "emulated_sm", lambda: 120)


@pytest.mark.parametrize("case", cases.GPU, ids=str)
def test_matches_oracle(case, tally):
    ops.check_attention(build(case), CUPY)
    tally("specialisations", 1)
    tally.each("storages", f"{case.dtype} {case.cache_dtype} {case.layout}")
    tally.each("head sizes", case.head_size)
    tally.each("block sizes", case.block_size)
    tally.each("group sizes", case.group)


@pytest.mark.parametrize("case", cases.GPU[::3], ids=str)
def test_matches_oracle_on_few_thread_blocks(case):
    with thread_blocks.at_most(3):
        ops.check_attention(build(case), CUPY)


@pytest.mark.parametrize("case", cases.GPU[::6], ids=str)
def test_scratch_in_the_dtype_of_the_query(case):
    ops.check_attention(build(case), CUPY, scratches=(case.dtype,))


@pytest.mark.usefixtures("older_chip")
@pytest.mark.parametrize("case", cases.GPU[::5], ids=str)
def test_matches_oracle_on_the_paths_of_older_chips(case):
    ops.check_attention(build(case), CUPY)


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("case", cases.TENSOR_CORES[::4], ids=str)
def test_matches_oracle_on_the_paths_of_an_ampere(case):
    ops.check_attention(build(case), CUPY)


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("case", cases.TENSOR_CORES[1::4], ids=str)
def test_matches_oracle_with_little_shared_memory(case):
    ops.check_attention(build(case), CUPY)


@pytest.mark.usefixtures("small_memory")
@STORAGES
@pytest.mark.parametrize(("group", "head_size"), [(8, 128), (3, 256)])
def test_long_contexts_with_little_shared_memory(dtype, kv_cache_dtype, layout, group, head_size):
    lengths = 131072, 1, 70001, 0, 8192, 4097
    ops.check_attention(
        build(Case(dtype, kv_cache_dtype, layout, 1, group, head_size, seq_lens=lengths)), CUPY
    )


@pytest.mark.parametrize("case", cases.TENSOR_CORES[::5], ids=str)
def test_scratch_of_tensor_cores(case):
    problem = build(case)
    for scratch in "float32", case.dtype:
        ops.check_scratch(problem, CUPY, 512, ops.partitions_needed(problem) + 1, scratch)


@STORAGES
def test_needles_in_long_contexts(dtype, kv_cache_dtype, layout, tally):
    length, group = 131072, 8
    case = Case(dtype, kv_cache_dtype, layout, 1, group, head_size=128, seq_lens=())
    tokens = [0, 15, 16, 511, 512, 65535, 65536, length - 1]
    ops.check_attention(needles(case, length, tokens), CUPY)
    tally("needles", len(tokens))


@STORAGES
def test_long_contexts(dtype, kv_cache_dtype, layout):
    lengths = 131072, 1, 70001, 0, 8192, 4097
    case = Case(dtype, kv_cache_dtype, layout, 1, 8, head_size=128, seq_lens=lengths)
    ops.check_attention(build(case), CUPY)


def test_a_million_tokens(tally):
    length = 2**20 + 1
    case = Case(num_kv_heads=1, group=8, head_size=64, seq_lens=())
    ops.check_attention(needles(case, length, [0, 2**20]), CUPY)
    tally("needles", 2)
    tally.most("tokens of a sequence", length)


class TestAttention(AttentionSuite):
    @pytest.fixture(params=frameworks.writable(frameworks.device()), ids=lambda a: a.name)
    def arrays(self, request):
        return request.param


@pytest.mark.usefixtures("older_chip")
class TestAttentionOnOlderChips:
    test_needles = AttentionSuite.test_needle_at_every_page_and_partition_edge
    test_poison = AttentionSuite.test_dead_slots_and_wild_ids_change_nothing
    test_large_logits = AttentionSuite.test_large_logits
    test_rows_without_tokens = AttentionSuite.test_rows_without_tokens_are_zero
    test_rows_too_long = AttentionSuite.test_rows_longer_than_their_table_are_nan
    test_nan = AttentionSuite.test_nan_stays_with_its_row_and_head
    test_hidden_partitions = AttentionSuite.test_scratch_of_partitions_that_block_sparsity_skips

    @pytest.fixture
    def arrays(self):
        return CUPY


@pytest.mark.usefixtures("ampere")
class TestAttentionOnAnAmpere:
    test_poison = AttentionSuite.test_dead_slots_and_wild_ids_change_nothing
    test_nan = AttentionSuite.test_nan_stays_with_its_row_and_head
    test_magnitudes = AttentionSuite.test_bfloat16_queries_beyond_the_range_of_float16

    @pytest.fixture
    def arrays(self):
        return CUPY
