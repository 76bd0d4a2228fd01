"""What holds for vLLM's functions once ours stand in for them, with any framework's arrays.

They are called as vLLM calls them: through the module, with its arguments in its order.
"""

import numpy as np
import pytest

from cupy_paged.interop.vllm import install
from support import cache_suite, compare, fake_vllm, merge_suite, oracle
from support import ops as calls
from support.block_suite import pairs
from support.data import DTYPES, Case, build, empty_caches, owners, poison, random_bits
from support.gather_suite import gather_problem
from support.oracle import BlockSparse

LENGTHS = 33, 0, 1, 600, 1030
CASES = [
    Case("float16", "auto", "vllm", seq_lens=LENGTHS),
    Case("bfloat16", "fp8", "vllm", seq_lens=LENGTHS, alibi=True),
    Case("float32", "auto", "vllm", seq_lens=LENGTHS, sparse=BlockSparse(1, 4, 32, 1, 1)),
    Case("float16", "fp8_e5m2", "vllm", seq_lens=LENGTHS, sparse=BlockSparse(2, 3, 16, -1)),
]
STORAGE = pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype"), [("float16", "auto"), ("bfloat16", "fp8"), ("float32", "fp8_e5m2")]
)


def scales_of(case, arrays, form):
    """The two scales as vLLM gives them: arrays of one element, or, in older versions, floats."""
    if form == "float":
        return case.scales
    return [arrays.array(np.full(1, scale, np.float32)) for scale in case.scales]


class VllmSuite:
    @pytest.fixture
    def vllm(self, monkeypatch):
        """The module vllm._custom_ops, with our ops in it."""
        fake_vllm.put_in_place(monkeypatch, fake_vllm.module())
        with install() as handle:
            yield handle.module

    @pytest.mark.parametrize("scales", ["float", "array"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_paged_attention(self, vllm, arrays, case, scales):
        problem = build(case)
        k_scale, v_scale = scales_of(case, arrays, scales)
        tail, _ = calls.positional(problem, arrays, k_scale=k_scale, v_scale=v_scale)
        num_seqs, num_heads, head_size = shape = problem.query.shape
        expected, _ = problem.expected
        out = calls.empty(shape, case.dtype, arrays)
        assert vllm.paged_attention_v1(out, *tail) is None
        compare.close(arrays.numpy(out), expected, case.dtype, "paged_attention_v1")

        shape = num_seqs, num_heads, calls.partitions_needed(problem)
        named = {
            "out": calls.empty(problem.query.shape, case.dtype, arrays),
            "exp_sum": calls.empty(shape, "float32", arrays, calls.SENTINEL),
            "max_logits": calls.empty(shape, "float32", arrays, calls.SENTINEL),
            "tmp_out": calls.empty((*shape, head_size), case.dtype, arrays, calls.SENTINEL),
            **dict(zip(calls.POSITIONAL, tail, strict=True)),
        }
        assert vllm.paged_attention_v2(**named) is None
        compare.close(arrays.numpy(named["out"]), expected, case.dtype, "paged_attention_v2")
        parts = problem.expected_partitions(512, shape[2])
        live = np.repeat(parts.live[:, None], num_heads, axis=1)
        for name, want in ("exp_sum", parts.exp_sums), ("max_logits", parts.max_logits):
            got = arrays.numpy(named[name])
            compare.close_lse(got[live], want[live], name)
            assert (got[~live] == np.float32(calls.SENTINEL)).all()

    @pytest.mark.parametrize("scales", ["float", "array"])
    @pytest.mark.parametrize("layout", ["vllm", "NHD", "HND"])
    @STORAGE
    def test_cache_writers(self, vllm, arrays, rng, layout, dtype, kv_cache_dtype, scales):
        case = Case(dtype, kv_cache_dtype, layout, num_kv_heads=3)
        key, value = cache_suite.tokens(rng, case, 20)
        caches = empty_caches(case, 3, rng)
        slot_mapping = cache_suite.slots(rng, case, 17, 3)
        expected = oracle.reshape_and_cache(
            key, value, *caches, slot_mapping, layout=layout, block_size=case.block_size,
            kv_cache_dtype=kv_cache_dtype, k_scale=case.scales[0], v_scale=case.scales[1],
        )  # fmt: skip
        made = [arrays.array(calls.cache_bytes(cache)) for cache in caches]
        # vLLM turns a cache in layout "HND" into a view with the shape of "NHD".
        given = [cache.swapaxes(1, 2) for cache in made] if layout == "HND" else made
        write = vllm.reshape_and_cache if layout == "vllm" else vllm.reshape_and_cache_flash
        positional = [
            arrays.array(key), arrays.array(value), *given, arrays.array(slot_mapping),
            kv_cache_dtype, *scales_of(case, arrays, scales),
        ]  # fmt: skip
        assert write(*positional) is None
        for got, want, name in zip(made, expected, ("key_cache", "value_cache"), strict=True):
            compare.bitwise(arrays.numpy(got).view(want.dtype), want, name)

    @STORAGE
    def test_concat_and_cache_mla(self, vllm, arrays, rng, dtype, kv_cache_dtype):
        rank, pe_dim, num_blocks, block_size = 512, 64, 4, 9
        kv_c, k_pe = (
            (20 * rng.standard_normal((30, width))).astype(DTYPES[dtype])
            for width in (rank, pe_dim)
        )
        stored = np.dtype(oracle.FP8.get(kv_cache_dtype, DTYPES[dtype]))
        cache = poison((num_blocks, block_size, rank + pe_dim), stored, rng)
        slot_mapping = cache_suite.slots(rng, Case(block_size=block_size), 30, num_blocks)
        made = arrays.array(calls.cache_bytes(cache))
        scale = arrays.array(np.full(1, 0.75, np.float32))
        given = arrays.array(kv_c), arrays.array(k_pe), made, arrays.array(slot_mapping)
        assert vllm.concat_and_cache_mla(*given, kv_cache_dtype, scale) is None
        expected = oracle.concat_and_cache_mla(
            kv_c, k_pe, cache, slot_mapping, kv_cache_dtype=kv_cache_dtype, scale=0.75
        )
        compare.bitwise(arrays.numpy(made).view(stored), expected)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_merge_attn_states(self, vllm, arrays, rng, dtype):
        given = merge_suite.empty_some(rng, merge_suite.states(rng, dtype))
        made = [arrays.array(array) for array in given]
        output = calls.empty(given[0].shape, dtype, arrays)
        lse = calls.empty(given[1].shape, "float32", arrays)
        assert vllm.merge_attn_states(output, *made, lse, 20) is None
        expected, expected_lse = oracle.merge_attn_states(*given, 20)
        compare.close(arrays.numpy(output), expected, dtype)
        compare.close_lse(arrays.numpy(lse), expected_lse)

    def test_merge_attn_states_to_float8(self, vllm, arrays, rng):
        given = merge_suite.states(rng, "float32")
        output = arrays.array(np.zeros(given[0].shape, np.uint8))
        scale = arrays.array(np.full(1, 0.5, np.float32))
        made = [arrays.array(array) for array in given]
        assert vllm.merge_attn_states(output, *made, output_scale=scale) is None
        expected, _ = oracle.merge_attn_states(*given)
        compare.rounded(arrays.numpy(output).view(DTYPES["float8_e4m3fn"]), expected / 0.5)

    def test_copy_blocks(self, vllm, arrays, rng):
        layers = [owners(Case(layout="vllm"), 9, rng) for _ in range(3)]
        block_mapping = pairs(rng, 9, 4)
        keys, values = zip(*layers, strict=True)
        made = [[arrays.array(cache) for cache in caches] for caches in (keys, values)]
        assert vllm.copy_blocks(*made, arrays.array(block_mapping)) is None
        for got, cache in zip(made[0] + made[1], keys + values, strict=True):
            compare.bitwise(arrays.numpy(got), oracle.copy_blocks(cache, block_mapping))

    def test_swap_blocks(self, vllm, arrays, rng):
        start, end = random_bits(rng, (2, 9, 3, 40), np.float16)
        block_mapping = np.array([[3, 0], [4, 1], [0, 7], [3, 5]])
        source, destination = arrays.array(start), arrays.array(end)
        assert vllm.swap_blocks(source, destination, 3 * 40 * 2, block_mapping) is None
        end[block_mapping[:, 1]] = start[block_mapping[:, 0]]
        compare.bitwise(arrays.numpy(destination), end)

    def test_convert_fp8(self, vllm, arrays, rng):
        values = rng.standard_normal((4, 64)).astype(np.float16)
        codes = arrays.array(np.zeros(values.shape, np.uint8))
        assert vllm.convert_fp8(codes, arrays.array(values), 0.37, "fp8") is None
        expected = oracle.quantise(values, 0.37, "fp8")
        compare.bitwise(arrays.numpy(codes).view(expected.dtype), expected)

        back = calls.empty(values.shape, "float16", arrays)
        assert vllm.convert_fp8(back, codes) is None
        compare.bitwise(arrays.numpy(back), expected.astype(np.float16))

    @pytest.mark.parametrize("name", ["cp_gather_cache", "gather_cache"])
    @pytest.mark.parametrize("entry", [(576,), (656,), (3, 64)])
    @pytest.mark.parametrize("to", [None, "float16"])
    def test_gathers(self, vllm, arrays, rng, name, entry, to):
        starts, lengths, spare = (0, 5, 31, 0), (33, 1, 0, 20), 7
        case = Case(
            "float16", "auto" if to is None else "fp8", "NHD",
            num_kv_heads=1 if len(entry) == 1 else entry[0], head_size=entry[-1],
        )  # fmt: skip
        cache, _, tables = gather_problem(case, starts, lengths, rng)
        stored, _ = oracle.gather_cache(
            cache, cache, tables, lengths, starts, layout="NHD", block_size=case.block_size
        )
        rows = random_bits(rng, (len(stored) + spare, *entry), np.float16)
        src_cache = calls.cache_bytes(cache).reshape(*cache.shape[:2], *entry)
        made = arrays.array(rows)
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        given = [arrays.array(array) for array in (src_cache, tables, ends)]
        given.insert(1, made)
        seq_starts = arrays.array(np.array(starts, np.int32))
        if to is None:
            assert getattr(vllm, name)(*given, len(lengths), seq_starts) is None
            expected = stored
        else:
            scale = arrays.array(np.full(1, 0.75, np.float32))
            token_to_seq = arrays.array(np.repeat(np.arange(4), lengths).astype(np.int32))
            stored = stored[:-3]  # in no more rows than it is told to fill
            vllm.gather_and_maybe_dequant_cache(
                *given, token_to_seq, len(stored), "fp8", scale, seq_starts
            )
            expected = (stored.astype(np.float32) * np.float32(0.75)).astype(np.float16)
        rows[: len(stored)] = expected.reshape(-1, *entry)
        compare.bitwise(arrays.numpy(made), rows)
