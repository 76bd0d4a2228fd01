"""What holds for the attention operators with the arrays of any framework that can be written.

A test module subclasses `AttentionSuite` and gives it an `arrays` fixture: an adapter of
`support.frameworks`.
"""

from dataclasses import replace

import numpy as np
import pytest

import cupy_paged
from support import compare, ops, oracle
from support.data import DTYPES, Case, build, edges, needles, write
from support.oracle import BlockSparse

RAGGED = 0, 1, 15, 16, 17, 100, 513
EVERY_STORAGE = pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "layout"),
    [
        ("float16", "auto", "vllm"),
        ("bfloat16", "auto", "HND"),
        ("float32", "auto", "NHD"),
        ("float16", "fp8", "vllm"),
        ("bfloat16", "fp8_e5m2", "NHD"),
    ],
)


def with_nan_key(problem, seq, token, kv_head):
    """`problem` with NaN in one channel of one key of a sequence."""
    caches = problem.key_cache.copy(), problem.value_cache.copy()
    key, value = (array[token : token + 1].copy() for array in problem.dense[seq])
    key[0, kv_head, 5] = np.nan
    write(problem.case, *caches, problem.block_tables[seq], token, key, value)
    return replace(problem, key_cache=caches[0], value_cache=caches[1])


class AttentionSuite:
    @EVERY_STORAGE
    def test_needle_at_every_page_and_partition_edge(
        self, arrays, dtype, kv_cache_dtype, layout, tally
    ):
        seq_len = 600
        case = Case(dtype, kv_cache_dtype, layout, num_kv_heads=1, seq_lens=())
        tokens = edges(seq_len, case.block_size, 512)
        problem = needles(case, seq_len, tokens)
        ops.check_attention(problem, arrays)
        out, *_ = ops.paged_attention_v2(problem, arrays, num_partitions=20, partition_size=32)
        compare.close(out, problem.expected[0], dtype)
        tally("needles", len(tokens))

    @EVERY_STORAGE
    @pytest.mark.parametrize("block_size", [16, 32])
    def test_dead_slots_and_wild_ids_change_nothing(
        self, arrays, dtype, kv_cache_dtype, layout, block_size, tally
    ):
        case = Case(dtype, kv_cache_dtype, layout, block_size=block_size, seq_lens=RAGGED)
        poisoned = build(case)
        for call in ops.paged_attention, ops.paged_attention_v1, ops.paged_attention_v2:
            found, clean = call(poisoned, arrays), call(poisoned.unpoisoned(), arrays)
            for got, want in zip(found, clean, strict=True):
                compare.bitwise(got, want, call.__name__)
            tally("poisoned pools", 1)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_large_logits(self, arrays, dtype):
        problem = build(Case(dtype=dtype, seq_lens=(40, 300, 513)), logits=80.0)
        ops.check_attention(problem, arrays)

    @pytest.mark.parametrize("magnitude", [1e30, 1e-30])
    @pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
    def test_bfloat16_queries_beyond_the_range_of_float16(self, arrays, kv_cache_dtype, magnitude):
        problem = build(Case("bfloat16", kv_cache_dtype, group=4, seq_lens=(40, 700, 17)))
        query = problem.query.astype(np.float64) * magnitude
        query[:, 1] *= 1e-3
        query[:, 2] = 0.0
        problem = replace(
            problem, query=query.astype(DTYPES["bfloat16"]), scale=problem.scale / magnitude
        )
        ops.check_attention(problem, arrays)
        ops.check_scratch(problem, arrays, 512, 2)

    @EVERY_STORAGE
    @pytest.mark.parametrize("longest", [100, 700])
    @pytest.mark.parametrize("where", ["query", "key"])
    def test_nan_stays_with_its_row_and_head(
        self, arrays, dtype, kv_cache_dtype, layout, longest, where
    ):
        clean = build(Case(dtype, kv_cache_dtype, layout, group=3, seq_lens=(33, longest, 17)))
        at = 1, 4
        query = clean.query.copy()
        problem = replace(clean, query=query)
        if where == "query":
            query[1, 4, 7] = np.nan
        else:
            at = 1, slice(3, 6)
            problem = with_nan_key(clean, 1, 70, kv_head=1)
        wrong = np.zeros(query.shape[:2], bool)
        wrong[at] = True

        found, expected = (ops.paged_attention(p, arrays) for p in (problem, clean))
        for got, want in zip(found, expected, strict=True):
            assert np.isnan(got[wrong].astype(float)).all()
            compare.bitwise(got[~wrong], want[~wrong])
        assert np.isnan(ops.paged_attention_v1(problem, arrays)[0][wrong].astype(float)).all()

        out, exp_sums, _, tmp_out = ops.paged_attention_v2(problem, arrays)
        compare.bitwise(out[~wrong], expected[0][~wrong])
        hit = slice(0, 1) if where == "key" else slice(0, ops.partitions_needed(problem))
        for state in out[wrong], exp_sums[wrong][:, hit], tmp_out[wrong][:, hit]:
            assert np.isnan(state.astype(float)).all()
        assert not np.isnan(exp_sums[~wrong]).any()

    @pytest.mark.parametrize("alibi", [False, True])
    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_row_alone_has_the_bits_it_has_in_a_batch(self, arrays, dtype, alibi, tally):
        problem = build(Case(dtype=dtype, alibi=alibi, seq_lens=RAGGED))
        for call in ops.paged_attention, ops.paged_attention_v2:
            batch = call(problem, arrays)
            for row in range(len(RAGGED)):
                alone = call(problem.rows([row]), arrays)
                compare.bitwise(alone[0][0], batch[0][row], f"{call.__name__}, row {row}")
            tally("rows in other batches", len(RAGGED))

    @pytest.mark.parametrize("partition_size", [16, 64, 128, 512, 1024])
    @pytest.mark.parametrize("scratch", ["float32", "float16"])
    def test_scratch_of_v2(self, arrays, partition_size, scratch):
        problem = build(Case(seq_lens=(1030, 0, 1, 511, 512, 513, 16, 17), alibi=True))
        needed = ops.partitions_needed(problem, partition_size)
        ops.check_scratch(problem, arrays, partition_size, needed + 1, scratch)

    @pytest.mark.parametrize(
        ("max_seq_len", "num_partitions", "partition_size"),
        [
            (1024, 2, 512),
            (1025, 3, 512),
            (1000, 4, 512),
            (1000, 1, 1024),
            (1025, 2, 1024),
            (2100, 4, 1024),
            (5000, 2, 4096),
            (70, 1, 512),
            (70, 5, 512),
            (0, 1, 512),
        ],
    )
    def test_partition_size_follows_the_scratch(
        self, arrays, max_seq_len, num_partitions, partition_size
    ):
        problem = build(Case(seq_lens=(max_seq_len, max_seq_len // 2, min(max_seq_len, 1), 0)))
        problem = replace(problem, max_seq_len=max_seq_len)
        ops.check_scratch(problem, arrays, partition_size, num_partitions, named=False)

    def test_partitions_cut_pages_that_do_not_divide_them(self, arrays):
        problem = build(Case(block_size=24, seq_lens=(600, 130, 23)))
        ops.check_scratch(problem, arrays, 128, 6)

    def test_scratch_of_partitions_that_block_sparsity_skips(self, arrays):
        # One local block of 16 tokens, and only blocks 7, 15, ... besides: most partitions of
        # 32 tokens hold no attended token.
        sparse = BlockSparse(1, 8, 16, 0)
        problem = build(Case(sparse=sparse, seq_lens=(300, 33, 16), group=3))
        assert (problem.expected_partitions(32, 11).max_logits < -1e38).any()
        ops.check_scratch(problem, arrays, 32, 11)

    @pytest.mark.parametrize("layout", ["vllm", "HND"])
    def test_nan_that_block_sparsity_hides_from_a_head(self, arrays, layout):
        sparse = BlockSparse(1, 4, 16, 1)
        case = Case(layout=layout, sparse=sparse, num_kv_heads=1, group=4, seq_lens=(200,))
        clean = build(case)
        caches, token = (clean.key_cache.copy(), clean.value_cache.copy()), 100
        nan = np.full((1, 1, 64), np.nan, np.float16)
        write(case, *caches, clean.block_tables[0], token, nan, nan)
        problem = replace(clean, key_cache=caches[0], value_cache=caches[1])
        sees = [oracle.attended(200, head, 4, 1, 16, sparse)[token] for head in range(4)]
        assert any(sees) and not all(sees)
        for call in ops.paged_attention, ops.paged_attention_v1:
            found, expected = call(problem, arrays)[0][0], call(clean, arrays)[0][0]
            for head in range(4):
                if sees[head]:
                    assert np.isnan(found[head]).all()
                else:
                    compare.bitwise(found[head], expected[head], f"head {head}")

    def test_block_sparsity_that_leaves_no_token(self, arrays):
        problem = build(Case(sparse=BlockSparse(0, 64, 16, 0), seq_lens=(100, 1, 0)))
        out, lse = ops.paged_attention(problem, arrays)
        assert (out == 0).all() and (lse == -np.inf).all()
        assert (ops.paged_attention_v1(problem, arrays)[0] == 0).all()
        assert (ops.paged_attention_v2(problem, arrays)[0] == 0).all()

    @pytest.mark.parametrize("vert_stride", [0, 1])
    def test_vertical_strides_below_two_mean_dense(self, arrays, vert_stride):
        problem = build(Case(seq_lens=(100, 17)))
        sparse = ops.sparse_arguments(BlockSparse(1, vert_stride, 16, 1))
        out, _ = ops.paged_attention(problem, arrays, **sparse)
        compare.close(out, problem.expected[0], "float16")

    @pytest.mark.parametrize("where", [slice(0, 1), slice(2, 3), slice(4, 5), slice(None)])
    @pytest.mark.parametrize("seq_len", [0, -1, -(2**31)])
    def test_rows_without_tokens_are_zero(self, arrays, where, seq_len):
        problem = build(Case(seq_lens=(5, 40, 17, 100, 16)))
        problem.seq_lens[where] = seq_len
        ops.check_attention(problem, arrays)
        out, lse = ops.paged_attention(problem, arrays)
        assert (out[where] == 0).all() and (lse[where] == -np.inf).all()

    @pytest.mark.parametrize("excess", [1, 16, 10_000, 2**31 - 1])
    def test_rows_longer_than_their_table_are_nan(self, arrays, excess):
        problem = build(Case(seq_lens=(5, 40, 17)))
        problem.seq_lens[1] = min(problem.capacity + excess, 2**31 - 1)
        ops.check_attention(problem, arrays)
        assert np.isnan(ops.paged_attention(problem, arrays)[0][1]).all()

    def test_rows_longer_than_max_seq_len_are_nan(self, arrays):
        problem = replace(build(Case(seq_lens=(5, 41, 40, 17))), max_seq_len=40)
        ops.check_attention(problem, arrays)
        assert np.isnan(ops.paged_attention(problem, arrays)[0][1]).all()

    @pytest.mark.parametrize("max_seq_len", [0, 1, 40, 512, 1024])
    def test_what_an_estimate_leaves_out_is_nan_and_the_rest_is_whole(self, max_seq_len, arrays):
        problem = build(Case(seq_lens=(5, 41, 40, 600, 1, 0, 1500, 900)))
        too_long = problem.seq_lens > max_seq_len
        estimated = replace(problem, max_seq_len=max_seq_len)
        for call in ops.paged_attention, ops.paged_attention_v1:
            for got, want in zip(call(estimated, arrays), call(problem, arrays), strict=True):
                assert np.isnan(got[too_long]).all()
                compare.bitwise(got[~too_long], want[~too_long], call.__name__)
        num_partitions = max(-(-max_seq_len // 512), 1)
        out, *_ = ops.paged_attention_v2(estimated, arrays, num_partitions=num_partitions)
        assert np.isnan(out[too_long]).all()
        compare.close(out[~too_long], problem.expected[0][~too_long], "float16")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_one_token_gives_its_value_bit_by_bit(self, dtype, arrays):
        """Whatever is added to a sum of weights so that it cannot be 0 would show."""
        problem = build(Case(dtype, seq_lens=(1, 1, 1)))
        (found,) = ops.paged_attention_v1(problem, arrays)
        for row, (_, values) in zip(found, problem.dense, strict=True):
            compare.bitwise(row, np.repeat(values[0], problem.case.group, axis=0))

    @pytest.mark.parametrize("max_seq_len", [513, 514, 2000, 10**6, 2**40])
    def test_the_estimate_of_max_seq_len_changes_no_bit(self, arrays, max_seq_len):
        problem = build(Case(seq_lens=RAGGED))
        out, lse = ops.paged_attention(problem, arrays)
        estimated = replace(problem, max_seq_len=max_seq_len)
        again, lse_again = ops.paged_attention(estimated, arrays)
        compare.bitwise(again, out)
        compare.bitwise(lse_again, lse)
        (again,) = ops.paged_attention_v1(estimated, arrays)
        compare.bitwise(again, *ops.paged_attention_v1(problem, arrays))

    @pytest.mark.parametrize("max_seq_len", [514, 1024, 1025, 4096])
    def test_scratch_kept_for_any_batch_changes_no_bit(self, arrays, max_seq_len):
        problem = replace(build(Case(seq_lens=RAGGED)), max_seq_len=513)
        expected = ops.paged_attention_v2(problem, arrays, num_partitions=8)
        estimated = replace(problem, max_seq_len=max_seq_len)
        found = ops.paged_attention_v2(estimated, arrays, num_partitions=8)
        for got, want in zip(found, expected, strict=True):
            compare.bitwise(got, want)

    def test_an_empty_batch(self, arrays):
        problem = build(Case(seq_lens=()))
        out, lse = ops.paged_attention(problem, arrays)
        assert out.shape == (0, 4, 64) and lse.shape == (0, 4)
        assert ops.paged_attention_v1(problem, arrays)[0].shape == (0, 4, 64)
        assert ops.paged_attention_v2(problem, arrays)[0].shape == (0, 4, 64)

    def test_a_table_without_columns(self, arrays):
        problem = build(Case(seq_lens=(0, 0)))
        problem = replace(problem, block_tables=problem.block_tables[:, :0].copy())
        out, lse = ops.paged_attention(problem, arrays)
        assert (out == 0).all() and (lse == -np.inf).all()

    def test_out_is_given_and_returned(self, arrays):
        problem = build(Case())
        out = ops.empty(problem.query.shape, "float16", arrays)
        given = {**ops.arguments(problem, arrays), "out": out}
        assert cupy_paged.paged_attention(**given) is out
        compare.close(arrays.numpy(out), problem.expected[0], "float16")
        out, lse = cupy_paged.paged_attention(**{**given, "return_lse": True})
        assert out is given["out"]
        compare.close_lse(arrays.numpy(lse), problem.expected[1])

    def test_a_strided_out_leaves_its_gaps_alone(self, arrays):
        problem = build(Case(seq_lens=(33, 0, 1, 513)))
        num_seqs, num_heads, head_size = problem.query.shape
        width = num_heads * head_size
        wide = ops.empty((num_seqs, width + 32), "float16", arrays, ops.SENTINEL)
        out = wide[:, :width].reshape(problem.query.shape)
        cupy_paged.paged_attention(**ops.arguments(problem, arrays), out=out)
        found = arrays.numpy(wide)
        compare.close(found[:, :width].reshape(out.shape), problem.expected[0], "float16")
        assert (found[:, width:] == np.float16(ops.SENTINEL)).all()

    def test_without_return_lse_only_out_is_returned(self, arrays):
        problem = build(Case())
        out = cupy_paged.paged_attention(**ops.arguments(problem, arrays))
        assert arrays.owns(out)
        compare.close(arrays.numpy(out), problem.expected[0], "float16")

    @pytest.mark.parametrize("shape", [(1,), ()])
    def test_scales_as_one_element_arrays(self, arrays, shape):
        problem = build(Case(kv_cache_dtype="fp8", seq_lens=(100, 0, 17)))
        k_scale, v_scale = (
            arrays.array(np.full(shape, scale, np.float32)) for scale in problem.case.scales
        )
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        for call in ops.paged_attention, ops.paged_attention_v1, ops.paged_attention_v2:
            by_array, by_float = call(problem, arrays, **scales), call(problem, arrays)
            for got, want in zip(by_array, by_float, strict=True):
                compare.bitwise(got, want, call.__name__)

    def test_scales_of_an_unquantised_cache_are_ignored(self, arrays):
        problem = build(Case())
        out, _ = ops.paged_attention(problem, arrays, k_scale=3.0, v_scale=0.1)
        compare.close(out, problem.expected[0], "float16")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_the_cache_dtype_may_be_named(self, arrays, dtype):
        problem = build(Case(dtype=dtype))
        assert problem.query.dtype == DTYPES[dtype]
        out, _ = ops.paged_attention(problem, arrays, kv_cache_dtype=dtype)
        compare.close(out, problem.expected[0], dtype)

    def test_scale_defaults_to_the_root_of_head_size(self, arrays):
        problem = replace(build(Case()), scale=64**-0.5)
        out, _ = ops.paged_attention(problem, arrays, scale=None)
        compare.close(out, problem.expected[0], "float16")

    @pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
    def test_the_layout_is_inferred_where_shapes_leave_no_doubt(self, arrays, layout):
        problem = build(Case(layout=layout))
        out, _ = ops.paged_attention(problem, arrays, layout=None)
        compare.close(out, problem.expected[0], "float16")

    def test_sequences_may_share_blocks(self, arrays):
        problem = build(Case(seq_lens=(100, 64, 17, 100)))
        problem.block_tables[1, :4] = problem.block_tables[0, :4]
        problem.block_tables[3] = problem.block_tables[0]
        ops.check_attention(problem, arrays)
