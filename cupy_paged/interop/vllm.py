"""The ops of `vllm._custom_ops`, with its signatures, and `install`, which puts them there.

Arguments mean what they mean in the op of the same name in `cupy_paged`, which runs, checks them,
and names them in its errors; where vLLM has an argument that our op has not, the function below
says what becomes of it. Source: vLLM's vllm/_custom_ops.py.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import cupy_paged
from cupy_paged import checks
from cupy_paged.arrays import array
from cupy_paged.dtypes import itemsize
from cupy_paged.interop.replacement import Replacement

MODULE = "vllm._custom_ops"

# An entry is gathered as two halves, which are head sizes of ours.
_ENTRY_UNIT, _MAX_ENTRY = 16, 1024


def paged_attention_v1(
    out: Any,
    query: Any,
    key_cache: Any,
    value_cache: Any,
    num_kv_heads: int,
    scale: float,
    block_tables: Any,
    seq_lens: Any,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
) -> None:
    """`cupy_paged.paged_attention_v1` over caches in layout "vllm"."""
    cupy_paged.paged_attention_v1(
        out, query, key_cache, value_cache, num_kv_heads, scale, block_tables, seq_lens, block_size,
        max_seq_len, alibi_slopes, kv_cache_dtype, k_scale, v_scale, tp_rank,
        blocksparse_local_blocks, blocksparse_vert_stride, blocksparse_block_size,
        blocksparse_head_sliding_step, layout="vllm",
    )  # fmt: skip


def paged_attention_v2(
    out: Any,
    exp_sum: Any,
    max_logits: Any,
    tmp_out: Any,
    query: Any,
    key_cache: Any,
    value_cache: Any,
    num_kv_heads: int,
    scale: float,
    block_tables: Any,
    seq_lens: Any,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
) -> None:
    """`cupy_paged.paged_attention_v2` over caches in layout "vllm"; exp_sum is its exp_sums."""
    cupy_paged.paged_attention_v2(
        out, exp_sum, max_logits, tmp_out, query, key_cache, value_cache, num_kv_heads, scale,
        block_tables, seq_lens, block_size, max_seq_len, alibi_slopes, kv_cache_dtype, k_scale,
        v_scale, tp_rank, blocksparse_local_blocks, blocksparse_vert_stride,
        blocksparse_block_size, blocksparse_head_sliding_step, layout="vllm",
    )  # fmt: skip


def merge_attn_states(
    output: Any,
    prefix_output: Any,
    prefix_lse: Any,
    suffix_output: Any,
    suffix_lse: Any,
    output_lse: Any = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Any = None,
) -> None:
    """`cupy_paged.merge_attn_states`, into an output that is given."""
    if output is None:
        raise TypeError("output: got None, needs an array")
    cupy_paged.merge_attn_states(
        output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse,
        prefill_tokens_with_context, output_scale,
    )  # fmt: skip


def reshape_and_cache(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
) -> None:
    """`cupy_paged.reshape_and_cache`."""
    cupy_paged.reshape_and_cache(
        key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
    )


def reshape_and_cache_flash(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str,
    k_scale: Any,
    v_scale: Any,
) -> None:
    """`cupy_paged.reshape_and_cache_flash` into caches whose shape is that of layout "NHD".

    vLLM hands over a cache in layout "HND" as a view of that shape.
    """
    cupy_paged.reshape_and_cache_flash(
        key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
    )


def concat_and_cache_mla(
    kv_c: Any, k_pe: Any, kv_cache: Any, slot_mapping: Any, kv_cache_dtype: str, scale: Any
) -> None:
    """`cupy_paged.concat_and_cache_mla`; "fp8_ds_mla" is not among its `kv_cache_dtype`s."""
    cupy_paged.concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale)


def copy_blocks(
    key_caches: list[Any] | tuple[Any, ...],
    value_caches: list[Any] | tuple[Any, ...],
    block_mapping: Any,
) -> None:
    """`cupy_paged.copy_blocks`."""
    cupy_paged.copy_blocks(key_caches, value_caches, block_mapping)


def swap_blocks(src: Any, dst: Any, block_size_in_bytes: int, block_mapping: Any) -> None:
    """`cupy_paged.swap_blocks`; block_size_in_bytes must be that of a block of src.

    Host memory must be pinned.
    """
    block = array(src, "src")
    block_bytes = math.prod(block.shape[1:]) * itemsize(block.dtype)
    name = "block_size_in_bytes"
    if checks.is_int(block_size_in_bytes, name, at_most=2**63 - 1) != block_bytes:
        raise ValueError(f"{name}: {block_size_in_bytes} does not match src's {block_bytes}")
    cupy_paged.swap_blocks(src, dst, block_mapping)


def _swap_whole_blocks(src: Any, dst: Any, block_mapping: Any) -> None:
    """`swap_blocks` of vLLM before it was told how long a block is."""
    cupy_paged.swap_blocks(src, dst, block_mapping)


def convert_fp8(output: Any, input: Any, scale: float = 1.0, kv_dtype: str = "fp8") -> None:
    """`cupy_paged.convert_fp8`; "auto" is not among its `kv_dtype`s."""
    cupy_paged.convert_fp8(output, input, scale, kv_dtype)


def cp_gather_cache(
    src_cache: Any,
    dst: Any,
    block_table: Any,
    cu_seq_lens: Any,
    batch_size: int,
    seq_starts: Any = None,
) -> None:
    """Gathers the entries of sequences out of a paged cache, one sequence after the other.

    src_cache     [num_blocks, block_size, entry] or [num_blocks, block_size, heads, entry]
    dst           [num_tokens, entry] or [num_tokens, heads, entry], of the same dtype
    block_table   int32 [batch_size, max_num_blocks_per_seq]
    cu_seq_lens   int32 [batch_size + 1]; rows past the end of dst are left out
    seq_starts    int32 [batch_size], the first token of each sequence to take, any; None: 0

    An entry is a multiple of 16 elements, up to 1024. As keys and values `cupy_paged.gather_cache`
    is given the halves of each: its errors call those of src_cache key_cache and value_cache, and
    those of dst key and value.
    """
    _check_batch_size(batch_size, cu_seq_lens)
    _gather(src_cache, dst, block_table, cu_seq_lens, "auto", 1.0, seq_starts)


def gather_cache(
    src_cache: Any,
    dst: Any,
    block_table: Any,
    cu_seq_lens: Any,
    batch_size: int,
    seq_starts: Any = None,
) -> None:
    """`cp_gather_cache` by its older name, under which vLLM took whole blocks only."""
    cp_gather_cache(src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts)


def gather_and_maybe_dequant_cache(
    src_cache: Any,
    dst: Any,
    block_table: Any,
    cu_seq_lens: Any,
    token_to_seq: Any,
    num_tokens: int,
    kv_cache_dtype: str,
    scale: Any,
    seq_starts: Any = None,
) -> None:
    """`cp_gather_cache`, also out of an fp8 cache into floats: codes become code * scale.

    num_tokens     rows of dst to fill, at most
    token_to_seq   not used: cu_seq_lens says the same
    """
    checks.is_int(num_tokens, "num_tokens", at_least=0)
    array(dst, "dst")  # before it is cut
    _gather(
        src_cache, dst[:num_tokens], block_table, cu_seq_lens, kv_cache_dtype, scale, seq_starts
    )


def _gather_and_maybe_dequant_batch(
    src_cache: Any,
    dst: Any,
    block_table: Any,
    cu_seq_lens: Any,
    batch_size: int,
    kv_cache_dtype: str,
    scale: Any,
    seq_starts: Any = None,
) -> None:
    """`gather_and_maybe_dequant_cache` of vLLM before it was told the number of tokens."""
    _check_batch_size(batch_size, cu_seq_lens)
    _gather(src_cache, dst, block_table, cu_seq_lens, kv_cache_dtype, scale, seq_starts)


def _check_batch_size(batch_size: int, cu_seq_lens: Any) -> None:
    shape = array(cu_seq_lens, "cu_seq_lens").shape
    if shape != (checks.is_int(batch_size, "batch_size") + 1,):
        raise ValueError(f"batch_size: {batch_size} does not match cu_seq_lens' shape {shape}")


def _gather(
    src_cache: Any,
    dst: Any,
    block_table: Any,
    cu_seq_lens: Any,
    kv_cache_dtype: str,
    scale: Any,
    seq_starts: Any,
) -> None:
    cache, entry = array(src_cache, "src_cache").shape, array(dst, "dst").shape[1:]
    if len(entry) not in (1, 2) or cache[2:] != entry:
        raise ValueError(
            f"dst: rows of shape {entry}, needs [entry] or [heads, entry] as in src_cache's {cache}"
        )
    size = entry[-1]
    if size % _ENTRY_UNIT or not _ENTRY_UNIT <= size <= _MAX_ENTRY:
        raise ValueError(
            f"dst: entries of {size} elements, needs a multiple of {_ENTRY_UNIT} up to {_MAX_ENTRY}"
        )
    if len(entry) == 1:
        src_cache, dst = src_cache[:, :, None], dst[:, None]
    halves = slice(size // 2), slice(size // 2, size)
    cupy_paged.gather_cache(
        *(dst[..., half] for half in halves),
        *(src_cache[..., half] for half in halves),
        block_table,
        cu_seq_lens,
        seq_starts,
        kv_cache_dtype,
        scale,
        scale,
        layout="NHD",
    )


OPS: dict[str, tuple[Callable[..., None], ...]] = {
    "paged_attention_v1": (paged_attention_v1,),
    "paged_attention_v2": (paged_attention_v2,),
    "merge_attn_states": (merge_attn_states,),
    "reshape_and_cache": (reshape_and_cache,),
    "reshape_and_cache_flash": (reshape_and_cache_flash,),
    "concat_and_cache_mla": (concat_and_cache_mla,),
    "copy_blocks": (copy_blocks,),
    "swap_blocks": (swap_blocks, _swap_whole_blocks),
    "convert_fp8": (convert_fp8,),
    "cp_gather_cache": (cp_gather_cache,),
    "gather_cache": (gather_cache,),
    "gather_and_maybe_dequant_cache": (
        gather_and_maybe_dequant_cache,
        _gather_and_maybe_dequant_batch,
    ),
}
"""The ops by name, in each form that vLLM has had; the newest first."""


def install(module: ModuleType | None = None, names: Iterable[str] | None = None) -> Replacement:
    """Puts the ops where vLLM, or a fork of it, looks for them.

    >>> engine = ModuleType("engine._custom_ops")
    >>> with install(engine, names=["convert_fp8"]):
    ...     engine.convert_fp8 is convert_fp8
    True
    >>> hasattr(engine, "convert_fp8")
    False

    module   whose functions are replaced; None: vllm._custom_ops, which is imported. What a fork
             keeps elsewhere, as in aphrodite._custom_ops, is to be given
    names    the ops to put there; None: all of OPS, also those that vLLM has dropped

    Replaced are the attributes of that one module. Those who call its functions through it, or
    import them from now on, reach ours. Those who have imported a function before keep the one
    they have: install before vLLM's attention backends are imported. The operators under torch.ops
    (torch.ops._C, torch.ops._C_cache_ops) stay vLLM's own: the dispatcher of torch and compiled
    graphs hold them, and arguments have another order there.

    The module may have an older form of a function, with fewer parameters or those of OPS; it then
    gets ours of that form. From then on ours alone is called: what it does not support, such as
    the dtypes "fp8_ds_mla" and "nvfp4", is its own error, and never goes to the function replaced.

    Returns a handle that is a context manager, with `uninstall`, which puts everything back; see
    `Replacement` for where that meets the changes of others.
    Raises RuntimeError where the ops are installed already, TypeError, before anything is changed,
    for a function in the module with parameters of another meaning, and ImportError without vLLM.
    """
    if module is None:
        try:
            module = importlib.import_module(MODULE)
        except ImportError as error:
            raise ImportError(
                f"install: cannot import {MODULE} ({error}); pass the module that has the ops"
            ) from error
    if not isinstance(module, ModuleType) or module.__name__.startswith("torch.ops"):
        raise TypeError(f"module: got {module!r}, needs a module of Python functions")
    chosen = list(OPS if names is None else names)
    for name in chosen:
        if name not in OPS:
            raise ValueError(f"names: unknown {name!r}, needs some of {', '.join(OPS)}")
    return Replacement(module, {name: OPS[name] for name in chosen})
