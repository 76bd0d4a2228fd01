"""A package `vllm`: the signatures of vLLM's ops, annotations aside, and nothing behind them."""

import sys
from types import ModuleType

SIGNATURES = """
paged_attention_v1(out, query, key_cache, value_cache, num_kv_heads, scale, block_tables, \
seq_lens, block_size, max_seq_len, alibi_slopes, kv_cache_dtype, k_scale, v_scale, tp_rank=0, \
blocksparse_local_blocks=0, blocksparse_vert_stride=0, blocksparse_block_size=64, \
blocksparse_head_sliding_step=0)
paged_attention_v2(out, exp_sum, max_logits, tmp_out, query, key_cache, value_cache, num_kv_heads, \
scale, block_tables, seq_lens, block_size, max_seq_len, alibi_slopes, kv_cache_dtype, k_scale, \
v_scale, tp_rank=0, blocksparse_local_blocks=0, blocksparse_vert_stride=0, \
blocksparse_block_size=64, blocksparse_head_sliding_step=0)
merge_attn_states(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None, \
prefill_tokens_with_context=None, output_scale=None)
reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, \
v_scale)
reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, \
v_scale)
concat_and_cache_mla(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale)
copy_blocks(key_caches, value_caches, block_mapping)
swap_blocks(src, dst, block_size_in_bytes, block_mapping)
convert_fp8(output, input, scale=1.0, kv_dtype="fp8")
gather_cache(src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts=None)
cp_gather_cache(src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts=None)
gather_and_maybe_dequant_cache(src_cache, dst, block_table, cu_seq_lens, token_to_seq, num_tokens, \
kv_cache_dtype, scale, seq_starts=None)
"""
OLDER_SIGNATURES = """
merge_attn_states(output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse=None)
swap_blocks(src, dst, block_mapping)
gather_and_maybe_dequant_cache(src_cache, dst, block_table, cu_seq_lens, batch_size, \
kv_cache_dtype, scale, seq_starts=None)
"""
DROPPED = "paged_attention_v1", "paged_attention_v2", "copy_blocks", "gather_cache"
"""What the newest vLLM has no longer."""


def functions(signatures=SIGNATURES):
    """Functions of these signatures by name, which must never be called."""
    made = {}
    for signature in signatures.strip().splitlines():
        exec(f"def {signature}: raise AssertionError('the original was called')", made)
    del made["__builtins__"]
    return made


def module(*signatures, name="vllm._custom_ops", without=()):
    """A module of such functions and one more, which is none of ours; later signatures win."""
    made = ModuleType(name)
    for some in (SIGNATURES, *signatures, "rms_norm(out, input, weight, epsilon)"):
        vars(made).update(functions(some))
    for absent in without:
        delattr(made, absent)
    return made


def put_in_place(monkeypatch, custom_ops):
    """Makes `import vllm._custom_ops` find `custom_ops`."""
    package = ModuleType("vllm")
    package.__path__ = []
    package._custom_ops = custom_ops
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm._custom_ops", custom_ops)
