"""The functions of the package as functions of JAX, inside of jax.jit and outside of it.

They have the names, arguments and checks of the functions of `cupy_paged`, without `out` and
`stream`, and change nothing that they are given:

    paged_attention(query, ...) -> out, or (out, lse) with return_lse=True
    merge_attn_states(prefix_output, prefix_lse, suffix_output, ...) -> (output, output_lse)
    reshape_and_cache(key, value, key_cache, ...) -> (key_cache, value_cache)
    reshape_and_cache_flash(key, value, key_cache, ...) -> (key_cache, value_cache)
    concat_and_cache_mla(kv_c, k_pe, kv_cache, ...) -> kv_cache
    copy_blocks(key_caches, value_caches, block_mapping) -> (key_caches, value_caches)
    gather_cache(key, value, key_cache, ...) -> (key, value)

Inside of jax.jit, what is written is written in place where XLA finds that nobody asks for the old
contents: in a cache that is an intermediate result, is carried by jax.lax.scan, or is an argument
that was donated (`jax.jit(..., donate_argnums=...)`). Otherwise XLA copies it before, as it does in
every call outside of jax.jit.

Arrays are JAX's or NumPy's. Scales are numbers, which are a part of the compiled function, or
one-element arrays. slot_mapping and block_mapping may be int32, as JAX's integers are by default.

On a GPU, kernels are queued on XLA's own stream, and scratch memory is XLA's: no op waits for the
device, and XLA may put it into its command buffers, which are CUDA graphs. On the CPU, the NumPy
reference runs. Other backends raise ValueError.

A wrong argument raises what the function raises, while JAX traces. What only contents can show, as
a block outside of the caches on the host, is an error of JAX when the compiled code runs, with the
function's message in it.

jax.vmap calls an op once for each element, in order. An op has no gradient: jax.grad through one is
a NotImplementedError. Of an array spread over several devices each device gets all; with
jax.shard_map, each calls with its own part.

Needs JAX 0.6.1 or newer, for jax.experimental.buffer_callback.
"""

from __future__ import annotations

from typing import Any

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError(
        f'cupy_paged.interop.jax_ops needs JAX ({error}): pip install "cupy-paged[interop]"'
    ) from error

import cupy_paged
from cupy_paged.arrays import array
from cupy_paged.attention import attend
from cupy_paged.attention_checks import SparseArguments, check_call, check_out
from cupy_paged.attention_gpu import workspace_bytes
from cupy_paged.block_ops import check_layers
from cupy_paged.interop.jax_calls import TracedCall

__all__ = [
    "concat_and_cache_mla",
    "copy_blocks",
    "gather_cache",
    "merge_attn_states",
    "paged_attention",
    "reshape_and_cache",
    "reshape_and_cache_flash",
]


def paged_attention(
    query: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    seq_lens: Any,
    *,
    scale: float | None = None,
    layout: str | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    alibi_slopes: Any = None,
    max_seq_len: int | None = None,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
    return_lse: bool = False,
) -> Any:
    """`cupy_paged.paged_attention` of arrays that may be traced.

    Returns out, like query, or (out, lse), lse float32 [num_seqs, num_heads].
    Raises as the function does, and TypeError for arrays of others than JAX and NumPy.
    """
    sparse = SparseArguments(
        tp_rank,
        blocksparse_local_blocks,
        blocksparse_vert_stride,
        blocksparse_block_size,
        blocksparse_head_sliding_step,
    )
    traced = TracedCall(
        "paged_attention",
        _attend,
        {
            "query": query,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "block_tables": block_tables,
            "seq_lens": seq_lens,
        },
        {"k_scale": k_scale, "v_scale": v_scale, "alibi_slopes": alibi_slopes},
        {
            "scale": scale,
            "layout": layout,
            "kv_cache_dtype": kv_cache_dtype,
            "max_seq_len": max_seq_len,
            "sparse": sparse,
        },
    )
    call = traced.check(check_call)
    made = {
        "out": jax.ShapeDtypeStruct(call.query.shape, call.query.dtype),
        "workspace": jax.ShapeDtypeStruct((workspace_bytes(call),), "uint8"),
    }
    if return_lse:
        made["lse"] = jax.ShapeDtypeStruct(call.state_shape, "float32")
    found = traced.run(made)
    return (found["out"], found["lse"]) if return_lse else found["out"]


def _attend(out: Any, workspace: Any, lse: Any = None, **arguments: Any) -> None:
    call = check_call(**arguments)
    state = None if lse is None else array(lse, "lse", call.stream)
    memory = array(workspace, "workspace", call.stream)
    attend(call, check_out(call, out), state, workspace=memory.pointer)


def merge_attn_states(
    prefix_output: Any,
    prefix_lse: Any,
    suffix_output: Any,
    suffix_lse: Any,
    prefill_tokens_with_context: int | None = None,
    output_scale: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`cupy_paged.merge_attn_states` of arrays that may be traced.

    Returns (output, output_lse): output like prefix_output, or float8_e4m3fn where `output_scale`
    is given, and output_lse like prefix_lse.
    Raises as the function does, and TypeError for arrays of others than JAX and NumPy.
    """
    traced = TracedCall(
        "merge_attn_states",
        cupy_paged.merge_attn_states,
        {
            "prefix_output": prefix_output,
            "prefix_lse": prefix_lse,
            "suffix_output": suffix_output,
            "suffix_lse": suffix_lse,
        },
        {"output_scale": output_scale},
        {"prefill_tokens_with_context": prefill_tokens_with_context},
    )
    output, lse = traced.read["prefix_output"], traced.read["prefix_lse"]
    dtype = output.dtype if output_scale is None else jnp.float8_e4m3fn
    made = {
        "output": jax.ShapeDtypeStruct(output.shape, dtype),
        "output_lse": jax.ShapeDtypeStruct(lse.shape, lse.dtype),
    }
    traced.check(traced.function, made)
    found = traced.run(made)
    return found["output"], found["output_lse"]


def reshape_and_cache(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
) -> tuple[jax.Array, jax.Array]:
    """`cupy_paged.reshape_and_cache` of arrays that may be traced.

    Returns (key_cache, value_cache) with the tokens in their slots.
    Raises as the function does, and TypeError for arrays of others than JAX and NumPy.
    """
    return _write(
        "reshape_and_cache", key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale,
        {"kv_cache_dtype": kv_cache_dtype},
    )  # fmt: skip


def reshape_and_cache_flash(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    *,
    layout: str = "NHD",
) -> tuple[jax.Array, jax.Array]:
    """`cupy_paged.reshape_and_cache_flash` of arrays that may be traced.

    Returns (key_cache, value_cache) with the tokens in their slots.
    Raises as the function does, and TypeError for arrays of others than JAX and NumPy.
    """
    return _write(
        "reshape_and_cache_flash", key, value, key_cache, value_cache, slot_mapping, k_scale,
        v_scale, {"kv_cache_dtype": kv_cache_dtype, "layout": layout},
    )  # fmt: skip


def _write(
    name: str,
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    k_scale: Any,
    v_scale: Any,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    traced = TracedCall(
        name,
        getattr(cupy_paged, name),
        {
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "slot_mapping": slot_mapping,
        },
        {"k_scale": k_scale, "v_scale": v_scale},
        options,
        written=("key_cache", "value_cache"),
    )
    traced.check(traced.function)
    found = traced.run()
    return found["key_cache"], found["value_cache"]


def concat_and_cache_mla(
    kv_c: Any, k_pe: Any, kv_cache: Any, slot_mapping: Any, kv_cache_dtype: str, scale: Any
) -> jax.Array:
    """`cupy_paged.concat_and_cache_mla` of arrays that may be traced.

    Returns kv_cache with the tokens in their slots.
    Raises as the function does, and TypeError for arrays of others than JAX and NumPy.
    """
    traced = TracedCall(
        "concat_and_cache_mla",
        cupy_paged.concat_and_cache_mla,
        {"kv_c": kv_c, "k_pe": k_pe, "kv_cache": kv_cache, "slot_mapping": slot_mapping},
        {"scale": scale},
        {"kv_cache_dtype": kv_cache_dtype},
        written=("kv_cache",),
    )
    traced.check(traced.function)
    return traced.run()["kv_cache"]


def copy_blocks(
    key_caches: list[Any] | tuple[Any, ...],
    value_caches: list[Any] | tuple[Any, ...],
    block_mapping: Any,
    *,
    layout: str | None = None,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """`cupy_paged.copy_blocks` of arrays that may be traced.

    Returns (key_caches, value_caches) with the blocks copied.
    Raises as the function does, and TypeError for arrays of others than JAX and NumPy.
    """
    check_layers(key_caches, value_caches)
    traced = TracedCall(
        "copy_blocks",
        cupy_paged.copy_blocks,
        {"key_caches": key_caches, "value_caches": value_caches, "block_mapping": block_mapping},
        {},
        {"layout": layout},
        written=("key_caches", "value_caches"),
    )
    traced.check(traced.function)
    found = traced.run()
    return found["key_caches"], found["value_caches"]


def gather_cache(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    cu_seq_lens: Any,
    seq_starts: Any = None,
    kv_cache_dtype: str = "auto",
    k_scale: Any = 1.0,
    v_scale: Any = 1.0,
    *,
    layout: str,
) -> tuple[jax.Array, jax.Array]:
    """`cupy_paged.gather_cache` of arrays that may be traced.

    Returns (key, value) with the rows that were gathered; the others are as they were.
    Raises as the function does, and TypeError for arrays of others than JAX and NumPy.
    """
    traced = TracedCall(
        "gather_cache",
        cupy_paged.gather_cache,
        {
            "key": key,
            "value": value,
            "key_cache": key_cache,
            "value_cache": value_cache,
            "block_tables": block_tables,
            "cu_seq_lens": cu_seq_lens,
        },
        {"k_scale": k_scale, "v_scale": v_scale, "seq_starts": seq_starts},
        {"kv_cache_dtype": kv_cache_dtype, "layout": layout},
        written=("key", "value"),
    )
    traced.check(traced.function)
    found = traced.run()
    return found["key"], found["value"]
