"""What holds for the arrays of every framework, on the host and on a GPU alike.

A test module subclasses `FrameworkSuite` and gives it two fixtures: `arrays`, an adapter of
`support.frameworks`, and `reference`, the adapter whose results the others must repeat.
"""

import numpy as np
import pytest

import cupy_paged
from support import compare, ops
from support.data import Case, build

CASES = [
    Case("float16", "auto", "vllm"),
    Case("bfloat16", "auto", "HND", head_size=128),
    Case("float32", "auto", "NHD"),
    Case("float16", "fp8", "HND"),
    Case("bfloat16", "fp8_e5m2", "vllm", head_size=128),
]


class OnlyDLPack:
    """An array of which nothing is known but the DLPack protocol."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnlyCudaArrayInterface:
    """An array of which nothing is known but the CUDA array interface.

    stream    address of the stream to wait for; what the array says if None
    """

    def __init__(self, array, stream=None):
        self._array, self._stream = array, stream

    @property
    def __cuda_array_interface__(self):
        interface = self._array.__cuda_array_interface__
        return interface if self._stream is None else {**interface, "stream": self._stream}


def writing_calls(arrays):
    """Every operator that writes an argument: (name, positional arguments, what it writes)."""
    problem = build(Case(seq_lens=(40, 17)))
    num_seqs, num_heads, head_size = shape = problem.query.shape
    out = ops.empty(shape, "float16", arrays, 1.0)
    tail, keywords = ops.positional(problem, arrays)
    sums = [ops.empty((num_seqs, num_heads, 1), "float32", arrays, 1.0) for _ in range(2)]
    tmp_out = ops.empty((num_seqs, num_heads, 1, head_size), "float32", arrays, 1.0)
    output = ops.empty((3, 2, 64), "float16", arrays, 1.0)
    lse = ops.empty((2, 3), "float32", arrays, 1.0)
    states = output, lse, output, lse
    packed = [ops.empty(s, "float16", arrays, 1.0) for s in ((4, 2, 8, 16, 8), (4, 2, 64, 16))]
    rows = [ops.empty((4, 16, 2, 64), "float16", arrays, 1.0) for _ in "kv"]
    slots = arrays.array(np.arange(3))
    scales = "auto", 1.0, 1.0
    codes = arrays.array(np.ones((3, 2, 64), np.uint8))
    caches = {"key_cache": 2, "value_cache": 3}
    scratch = {"out": 0, "exp_sums": 1, "max_logits": 2, "tmp_out": 3}
    return [
        ("paged_attention_v1", [out, *tail], keywords, {"out": 0}),
        ("paged_attention_v2", [out, *sums, tmp_out, *tail], keywords, scratch),
        ("merge_attn_states", [output, *states, lse], {}, {"output": 0, "output_lse": 5}),
        ("reshape_and_cache", [output, output, *packed, slots, *scales], {}, caches),
        ("reshape_and_cache_flash", [output, output, *rows, slots, *scales], {}, caches),
        ("convert_fp8", [codes, output], {}, {"output": 0}),
    ]


def check_refuses_to_write(arrays):
    """Check that no operator writes an array of an immutable framework."""
    for name, positional, keywords, written in writing_calls(arrays):
        before = [arrays.numpy(positional[i]) for i in written.values()]
        with pytest.raises(TypeError, match=f"^({'|'.join(written)}): .*immutable"):
            getattr(cupy_paged, name)(*positional, **keywords)
        for i, want in zip(written.values(), before, strict=True):
            compare.bitwise(arrays.numpy(positional[i]), want, name)


class FrameworkSuite:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_bits_do_not_depend_on_the_framework(self, arrays, reference, case):
        problem = build(case)
        out, lse = ops.paged_attention(problem, arrays)
        expected, expected_lse = ops.paged_attention(problem, reference)
        compare.bitwise(out, expected)
        compare.bitwise(lse, expected_lse, "lse")

    @pytest.mark.parametrize("form", ["auto", "named"])
    @pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
    def test_float8_arrays(self, arrays, reference, form, kv_cache_dtype):
        problem = build(Case(kv_cache_dtype=kv_cache_dtype))
        changes = {
            "key_cache": arrays.array(problem.key_cache),
            "value_cache": arrays.array(problem.value_cache),
            "kv_cache_dtype": "auto" if form == "auto" and arrays.float8 else kv_cache_dtype,
        }
        out, _ = ops.paged_attention(problem, arrays, **changes)
        compare.bitwise(out, ops.paged_attention(problem, reference)[0])

    def test_results_come_in_the_framework_of_the_query(self, arrays, reference):
        problem = build(Case(seq_lens=(40, 17)))
        theirs, ours = ops.arguments(problem, arrays), ops.arguments(problem, reference)
        for query, rest, owner in (theirs, ours, arrays), (ours, theirs, reference):
            out, lse = cupy_paged.paged_attention(
                **{**rest, "query": query["query"]}, return_lse=True
            )
            assert owner.owns(out) and owner.owns(lse)
            compare.close(owner.numpy(out), problem.expected[0], "float16")
            compare.close_lse(owner.numpy(lse), problem.expected[1])

    @pytest.mark.parametrize("name", ["key_cache", "value_cache", "block_tables", "seq_lens"])
    def test_one_argument_of_another_framework(self, arrays, reference, name):
        problem = build(Case(seq_lens=(40, 17)))
        foreign = {name: ops.arguments(problem, arrays)[name]}
        out, _ = ops.paged_attention(problem, reference, **foreign)
        compare.bitwise(out, ops.paged_attention(problem, reference)[0])

    def test_arrays_known_by_dlpack_alone(self, arrays):
        problem = build(Case(seq_lens=(40, 17)))
        names = "key_cache", "value_cache", "block_tables", "seq_lens"
        given = ops.arguments(problem, arrays)
        wrapped = {name: OnlyDLPack(given[name]) for name in names}
        out, _ = ops.paged_attention(problem, arrays, **wrapped)
        compare.bitwise(out, ops.paged_attention(problem, arrays)[0])
