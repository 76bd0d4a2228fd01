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

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cupy_paged
from cupy_paged import gpu
from cupy_paged.arrays import HOST, Array, array, is_array, location, meta
from cupy_paged.attention import attend
from cupy_paged.attention_checks import SparseArguments, check_call, check_out
from cupy_paged.attention_gpu import workspace_bytes
from cupy_paged.block_ops import check_layers
from cupy_paged.compiler import loading_beside_captures
from cupy_paged.dtypes import itemsize

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError as error:
    raise ImportError(
        f"JAX {jax.__version__} has no jax.experimental.buffer_callback, 0.6.1 or newer does: "
        'pip install --upgrade "jax[cuda12]" (or [cuda13]; without either on a CPU)'
    ) from error

__all__ = [
    "concat_and_cache_mla",
    "copy_blocks",
    "gather_cache",
    "merge_attn_states",
    "paged_attention",
    "reshape_and_cache",
    "reshape_and_cache_flash",
]


# ---- ops ----


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
    op = _Op(
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
    call = op.check(check_call)
    made = {
        "out": jax.ShapeDtypeStruct(call.query.shape, call.query.dtype),
        "workspace": jax.ShapeDtypeStruct((workspace_bytes(call),), "uint8"),
    }
    if return_lse:
        made["lse"] = jax.ShapeDtypeStruct(call.state_shape, "float32")
    found = op.run(made)
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
    op = _Op(
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
    output, lse = op.read["prefix_output"], op.read["prefix_lse"]
    dtype = output.dtype if output_scale is None else jnp.float8_e4m3fn
    made = {
        "output": jax.ShapeDtypeStruct(output.shape, dtype),
        "output_lse": jax.ShapeDtypeStruct(lse.shape, lse.dtype),
    }
    op.check(op.function, made)
    found = op.run(made)
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
    op = _Op(
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
    op.check(op.function)
    found = op.run()
    return found["key_cache"], found["value_cache"]


def concat_and_cache_mla(
    kv_c: Any, k_pe: Any, kv_cache: Any, slot_mapping: Any, kv_cache_dtype: str, scale: Any
) -> jax.Array:
    """`cupy_paged.concat_and_cache_mla` of arrays that may be traced.

    Returns kv_cache with the tokens in their slots.
    Raises as the function does, and TypeError for arrays of others than JAX and NumPy.
    """
    op = _Op(
        "concat_and_cache_mla",
        cupy_paged.concat_and_cache_mla,
        {"kv_c": kv_c, "k_pe": k_pe, "kv_cache": kv_cache, "slot_mapping": slot_mapping},
        {"scale": scale},
        {"kv_cache_dtype": kv_cache_dtype},
        written=("kv_cache",),
    )
    op.check(op.function)
    return op.run()["kv_cache"]


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
    op = _Op(
        "copy_blocks",
        cupy_paged.copy_blocks,
        {"key_caches": key_caches, "value_caches": value_caches, "block_mapping": block_mapping},
        {},
        {"layout": layout},
        written=("key_caches", "value_caches"),
    )
    op.check(op.function)
    found = op.run()
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
    op = _Op(
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
    op.check(op.function)
    found = op.run()
    return found["key"], found["value"]


# ---- from arguments to a callback, and back ----


_INT64 = ("slot_mapping", "block_mapping")
"""Arguments that are int64, which JAX has only where it was enabled."""


class _Op:
    """A call of an op, of which JAX traces what is made out of arrays.

    name        of the op, for errors
    function    what runs, with all arguments by name, on arrays that it may write
    arrays      arguments that are arrays, or lists of them
    either      arguments that may be arrays, or else are a part of the compiled code
    options     the others
    written     those of `arrays` that `function` writes
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        arrays: dict[str, Any],
        either: dict[str, Any],
        options: dict[str, Any],
        written: tuple[str, ...] = (),
    ) -> None:
        self.name, self.function = name, function
        self.options = {**options, **{n: x for n, x in either.items() if not is_array(x)}}
        found = {**arrays, **{n: x for n, x in either.items() if is_array(x)}}
        found = {n: _operands(x, n) for n, x in found.items()}
        self.written = {n: x for n, x in found.items() if n in written}
        self.read = {n: x for n, x in found.items() if n not in written}

    def check(
        self, function: Callable[..., Any], made: dict[str, jax.ShapeDtypeStruct] | None = None
    ) -> Any:
        """What `function` returns for arrays of these shapes and dtypes, without memory."""
        given = {**self.written, **self.read, **(made or {})}
        leaves, tree = jax.tree.flatten(given)
        metas, pointer = [], 0
        for x in leaves:
            metas.append(meta(x.dtype.name, tuple(x.shape), pointer))
            # A multiple of what any address is a multiple of, and past all of the array.
            pointer += -(-math.prod(x.shape) * x.dtype.itemsize // 256) * 256 + 256
        described = jax.tree.unflatten(tree, metas)
        for name in _INT64:
            if name in described and described[name].dtype == "int32":
                described[name] = described[name]._replace(dtype="int64")
        return function(**described, **self.options, stream=0)

    def run(self, made: dict[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, Any]:
        """Runs the function, for which XLA makes arrays like `made`, too.

        Returns, by name, what it writes: these, and its arguments as they are afterwards.
        """
        read = {n: _halves(x) if n in _INT64 else x for n, x in self.read.items()}
        written_leaves, written_tree = jax.tree.flatten(self.written)
        read_leaves, read_tree = jax.tree.flatten(read)
        made_leaves, made_tree = jax.tree.flatten(made or {})
        like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written_leaves]
        operands = (*written_leaves, *read_leaves)
        results = [*like, *made_leaves]
        bound = buffer_callback(
            _callback(
                self.function, written_tree, read_tree, made_tree, tuple(self.options.items())
            ),
            results,
            vmap_method="sequential",
            input_output_aliases={i: i for i in range(len(like))},
            # A capture that nothing was queued in is an error of XLA's.
            command_buffer_compatible=all(math.prod(x.shape) for x in (*operands, *results)),
        )
        found = _without_gradient(self.name, bound)(*operands)
        split = len(like)
        return {
            **jax.tree.unflatten(written_tree, found[:split]),
            **jax.tree.unflatten(made_tree, found[split:]),
        }


def _operands(x: Any, name: str) -> Any:
    if isinstance(x, list | tuple):
        return [_operands(one, f"{name}[{i}]") for i, one in enumerate(x)]
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"{name}: got {type(x).__name__}, needs an array of JAX or NumPy")
    return jnp.asarray(x)


def _halves(x: jax.Array) -> jax.Array:
    """int32 as the lower and the higher half of each int64."""
    return jnp.stack([x, x >> 31], axis=-1) if x.dtype == jnp.int32 else x


def _without_gradient(
    name: str, run: Callable[..., list[jax.Array]]
) -> Callable[..., list[jax.Array]]:
    differentiable = jax.custom_jvp(run)

    @differentiable.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name}: has no gradient; where none is needed, pass it jax.lax.stop_gradient(x)"
        )

    return differentiable


@functools.lru_cache(maxsize=1024)  # JAX finds what it compiled by the identity of the callback
def _callback(
    function: Callable[..., Any],
    written: Any,
    read: Any,
    made: Any,
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., None]:
    """What XLA calls with its buffers: `function` with them as its arguments.

    written, read, made    the structure of each kind of arguments
    """

    def run(context: Any, results: list[Any], *operands: Any) -> None:
        on_host = location(operands[0])[1] is HOST
        stream = None if on_host else context.stream
        lent = [_on_host(x) if on_host else _on_device(x, stream) for x in (*results, *operands)]
        split, start = written.num_leaves, len(results)
        for target, source in zip(lent[:split], lent[start : start + split], strict=True):
            _take_over(target, source, stream)
        given = {
            **jax.tree.unflatten(written, lent[:split]),
            **jax.tree.unflatten(made, lent[split:start]),
            **jax.tree.unflatten(read, lent[start + split :]),
        }
        for name in _INT64:
            if name in given:
                given[name] = _joined(given[name])
        with loading_beside_captures():  # XLA's are of the thread-local mode
            function(**given, **dict(options), stream=stream)

    return run


def _on_host(buffer: Any) -> np.ndarray:
    return np.asarray(buffer)


def _on_device(buffer: Any, stream: int) -> Array:
    """A buffer that XLA lends for the work that is queued on its stream now.

    So nobody has to be waited for, nor to be kept.
    """
    return array(buffer, "buffer", stream)._replace(owner=None, framework="xla")


def _take_over(target: np.ndarray | Array, source: np.ndarray | Array, stream: int | None) -> None:
    """Gives a result what its argument holds, where they are not the one buffer that was asked for.

    XLA parts them where it lets a call read and write slices of larger arrays in place, as in the
    loop that jax.vmap makes.
    """
    if isinstance(target, np.ndarray):
        if target.ctypes.data != source.ctypes.data:
            target[...] = source
    elif target.pointer != source.pointer:
        size = math.prod(target.shape) * itemsize(target.dtype)
        whole = target.pointer, size, source.pointer, size, size, 1
        gpu.copy_rows(target.device, stream, *whole)


def _joined(halves: np.ndarray | Array) -> np.ndarray | Array:
    """The int64 that `_halves` took apart, where they lie."""
    if halves.dtype != "int32":
        return halves
    if isinstance(halves, np.ndarray):
        return halves.view(np.int64)[..., 0]
    shape = halves.shape[:-1]
    return halves._replace(
        dtype="int64", shape=shape, strides=tuple(stride // 2 for stride in halves.strides[:-1])
    )
