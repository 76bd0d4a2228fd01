"""Merging partial attentions over disjoint sets of tokens."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from cupy_paged import checks, reference
from cupy_paged.arrays import HOST, META, Array, array
from cupy_paged.compiler import Kernel, cpp, template
from cupy_paged.dtypes import FLOATS, decode, encode, itemsize
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.launch import ParamStruct, prepare, scale_fields
from cupy_paged.prepared import keep, repeat
from cupy_paged.prepared_call import PreparedCall
from cupy_paged.results import empty, hand_over
from cupy_paged.streams import launch_stream

NUM_THREADS = 256
FP8_OUTPUT = "float8_e4m3fn"

_MAX_GRID = 2**31 - 1
_INTO_NEW = "merge_attn_states with output=None returns new arrays"

PARAMS = ParamStruct(
    "MergeParams",
    """
    pointer  output prefix_output suffix_output prefix_lse suffix_lse output_lse
    pointer  output_scale_array
    int64    output_stride_token output_stride_head prefix_stride_token prefix_stride_head
    int64    suffix_stride_token suffix_stride_head
    int64    prefix_lse_stride_head prefix_lse_stride_token
    int64    suffix_lse_stride_head suffix_lse_stride_token
    int64    output_lse_stride_head output_lse_stride_token
    int64    num_tokens num_merged_tokens
    int      num_heads
    float    output_scale
    """,
)

OUTPUT, OUTPUT_LSE = map(PARAMS.pointers.index, ("output", "output_lse"))


@functools.lru_cache(maxsize=256)
def merge_kernel(
    input_dtype: str, output_dtype: str, head_size: int, width: int, row: str = "uint32"
) -> Kernel:
    """The merge kernel for rows that are read `width` elements at a time.

    row    the type that holds a row's number, "uint32" or "int64"
    """
    dtypes = cpp(input_dtype), cpp(output_dtype), cpp(row)
    name = template("merge_attn_states", *dtypes, head_size, width, NUM_THREADS)
    return Kernel("merge_attn_states.cu", name, NUM_THREADS)


@breaks_graphs
def merge_attn_states(
    output: Any,
    prefix_output: Any,
    prefix_lse: Any,
    suffix_output: Any,
    suffix_lse: Any,
    output_lse: Any = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Any = None,
    *,
    stream: Any = None,
) -> Any:
    """Attention over prefix and suffix together, from attention over each.

    >>> import numpy as np
    >>> prefix, suffix = np.zeros((1, 1, 8), np.float32), np.ones((1, 1, 8), np.float32)
    >>> lse = np.zeros((1, 1), np.float32)  # each side saw the same weight of tokens
    >>> merged, merged_lse = merge_attn_states(None, prefix, lse, suffix, lse)
    >>> float(merged[0, 0, 0]), round(float(merged_lse[0, 0]), 4)
    (0.5, 0.6931)

    output           [num_tokens, num_heads, head_size], of the inputs' dtype, or float8_e4m3fn (or
                     uint8) with `output_scale`; None to have it allocated and returned. May be
                     one of the two sides, as output_lse may; else in memory of its own
    prefix_output,   [num_tokens, num_heads, head_size], float16, bfloat16 or float32
    suffix_output
    prefix_lse,      float32 [num_heads, num_tokens], natural logarithm, any strides; an infinite
    suffix_lse       one, of either sign, means that this side saw no token. paged_attention
                     returns it the other way round: pass lse.T
    output_lse       float32 [num_heads, num_tokens], written if given
    prefill_tokens_with_context
                     tokens from here on have no prefix: suffix output and lse are copied as they
                     are, an infinite lse included; None: all tokens merge
    output_scale     float, or one-element float32 array: the output is saturate(merged / scale)
    stream           CUDA stream to run on; by default the current one of prefix_output's framework

    Where one side is empty the other is taken exactly, whatever the empty one's output holds. Where
    both are, the output is prefix_output and the lse -inf.

    Returns None, or (output, lse) if `output` is None.
    Raises ValueError or TypeError, before anything runs, for arguments that do not fit.
    Source: vLLM's csrc/attention/merge_attn_states.cu; Ye et al., FlashInfer, arXiv:2501.01005.
    """
    settings = ("merge_attn_states", prefill_tokens_with_context)
    arrays = (
        output, prefix_output, suffix_output, prefix_lse, suffix_lse, output_lse, output_scale,
    )  # fmt: skip
    made = repeat(prefix_output, settings, arrays, stream)
    if made is not None:
        return tuple(made) if output is None else None
    on = launch_stream(prefix_output, stream)
    prefix = array(prefix_output, "prefix_output", on)
    suffix = array(suffix_output, "suffix_output", on)
    lses = array(prefix_lse, "prefix_lse", on), array(suffix_lse, "suffix_lse", on)
    scale = None if output_scale is None else checks.scale(output_scale, "output_scale", on)
    checks.same_place([a for a in (suffix, *lses, scale) if isinstance(a, Array)], prefix)

    checks.has_dims(prefix, "[num_tokens, num_heads, head_size]")
    num_tokens, num_heads = prefix.shape[:2]
    for a in (prefix, suffix):
        checks.is_dtype(a, *FLOATS)
        checks.runs_forward(a)
        checks.is_packed(a, 2)
    checks.is_shape(suffix, prefix.shape, "the shape of prefix_output")
    if suffix.dtype != prefix.dtype:
        raise TypeError(
            f"suffix_output: dtype {suffix.dtype} does not match prefix_output's {prefix.dtype}"
        )
    for a in lses:
        if a.shape == (num_tokens, num_heads) != (num_heads, num_tokens):
            raise ValueError(
                f"{a.name}: shape {a.shape} is [num_tokens, num_heads], as paged_attention returns "
                f"it, needs [num_heads, num_tokens]: {a.name}.T"
            )
        checks.is_shape(a, (num_heads, num_tokens), "[num_heads, num_tokens]")
        checks.is_dtype(a, "float32")
        checks.runs_forward(a)
    merged_tokens = num_tokens
    if prefill_tokens_with_context is not None:
        name = "prefill_tokens_with_context"
        merged_tokens = checks.is_int(prefill_tokens_with_context, name, at_least=0)
        if merged_tokens > num_tokens:
            raise ValueError(
                f"{name}: got {merged_tokens}, needs at most num_tokens = {num_tokens}"
            )

    dtype = prefix.dtype if scale is None else FP8_OUTPUT
    if output is None:
        if output_lse is not None:
            raise ValueError("output_lse: given without output, needs both or neither")
        target = empty(prefix, "output", prefix.shape, dtype, on)
        target_lse = empty(prefix, "output_lse", lses[0].shape, "float32", on)
    else:
        target = _check_output(array(output, "output", on), prefix, scale)
        target_lse = None
        if output_lse is not None:
            target_lse = array(output_lse, "output_lse", on)
            checks.same_place([target_lse], prefix)
            checks.is_writable(target_lse, _INTO_NEW)
            checks.is_shape(target_lse, lses[0].shape, "[num_heads, num_tokens]")
            checks.is_dtype(target_lse, "float32")
        _replaces_or_is_apart([target, target_lse], [prefix, suffix, *lses, scale])
    target = target._replace(dtype=dtype)  # uint8 holds the same bits

    if math.prod(prefix.shape) and prefix.device != META:
        checked = (target, target_lse, prefix, suffix, *lses, merged_tokens, scale)
        if prefix.device is HOST:
            _merge_on_host(*checked)
        else:
            prepared = _merge_on_gpu(*checked, output is None, on)
            keep(prefix_output, settings, arrays, prepared)
    if output is None:
        return hand_over(target, prefix, on), hand_over(target_lse, prefix, on)
    return None


def _check_output(target: Array, prefix: Array, scale: float | Array | None) -> Array:
    checks.is_writable(target, _INTO_NEW)
    checks.same_place([target], prefix)
    checks.is_shape(target, prefix.shape, "the shape of prefix_output")
    checks.is_packed(target, 2)
    if scale is not None:
        checks.is_dtype(target, FP8_OUTPUT, "uint8")
    elif target.dtype in (FP8_OUTPUT, "uint8"):
        raise ValueError(f"output_scale: None, needs a scale for an output of {target.dtype}")
    else:
        checks.is_dtype(target, prefix.dtype)
    return target


def _replaces_or_is_apart(written: list[Array | None], read: list[Any]) -> None:
    """Raises ValueError for a result that shares memory with an argument, but is not that one."""
    arrays = [a for a in (*written, *read) if isinstance(a, Array)]

    def place(a: Array) -> tuple[Any, ...]:
        return a.pointer, a.dtype, a.shape, a.strides

    for a in filter(None, written):
        checks.are_apart([a], [other for other in arrays if place(other) != place(a)])


def _merge_on_host(
    output: Array,
    output_lse: Array | None,
    prefix: Array,
    suffix: Array,
    prefix_lse: Array,
    suffix_lse: Array,
    merged_tokens: int,
    scale: float | Array | None,
) -> None:
    merged, lse = reference.merge_attn_states(
        decode(prefix.bits, prefix.dtype),
        prefix_lse.bits,
        decode(suffix.bits, suffix.dtype),
        suffix_lse.bits,
        merged_tokens,
    )
    if scale is not None:
        merged *= np.float32(1.0) / np.float32(checks.host_scale(scale))
    output.bits[...] = encode(merged, output.dtype)
    if output_lse is not None:
        output_lse.bits[...] = lse


def _merge_on_gpu(
    output: Array,
    output_lse: Array | None,
    prefix: Array,
    suffix: Array,
    prefix_lse: Array,
    suffix_lse: Array,
    merged_tokens: int,
    scale: float | Array | None,
    makes_output: bool,
    stream: int,
) -> PreparedCall:
    num_tokens, num_heads, head_size = prefix.shape
    # Output rows may be read in pieces as small as their own elements allow.
    output_width = output.alignment(range(2), head_size) // itemsize(output.dtype)
    alignment = min(
        prefix.alignment(range(2), head_size),
        suffix.alignment(range(2), head_size),
        output_width * itemsize(prefix.dtype),
    )
    width = math.gcd(alignment // itemsize(prefix.dtype), head_size)
    rows_per_block = max(NUM_THREADS // (head_size // width), 1)
    num_rows = num_tokens * num_heads
    work = min(-(-num_rows // rows_per_block), _MAX_GRID)
    row = "uint32" if num_rows < 2**31 else "int64"
    kernel = merge_kernel(prefix.dtype, output.dtype, head_size, width, row)

    strides = {}
    for name, a in (("output", output), ("prefix", prefix), ("suffix", suffix)):
        strides[f"{name}_stride_token"], strides[f"{name}_stride_head"] = a.strides[:2]
    for name, a in (
        ("prefix_lse", prefix_lse),
        ("suffix_lse", suffix_lse),
        ("output_lse", output_lse or prefix_lse),
    ):
        strides[f"{name}_stride_head"], strides[f"{name}_stride_token"] = a.strides
    params = PARAMS.template(
        strides
        | scale_fields("output_scale", 1.0 if scale is None else scale)
        | {
            "num_tokens": num_tokens,
            "num_merged_tokens": merged_tokens,
            "num_heads": num_heads,
        }
    )
    prepared = PreparedCall(
        prefix,
        [prepare(kernel, prefix.device, stream, work)],
        params,
        made={OUTPUT: output, OUTPUT_LSE: output_lse} if makes_output else {},
    )
    # In the order of PARAMS.
    given = (output, prefix, suffix, prefix_lse, suffix_lse, output_lse, scale)
    prepared.first(prefix, given, stream)
    return prepared
