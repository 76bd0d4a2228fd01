"""Faults in the kernels that merge, write, copy, gather and convert."""

# ruff: noqa: E501  (sources as they are)

from mutants.mutant import Mutant

CONVERSIONS = "tests/gpu/test_cache_ops.py::TestConvertOnOlderChips"
COPIES = "tests/gpu/test_block_ops.py::TestCopyBlocks"
SWAPS = "tests/gpu/test_block_ops.py::TestSwapBlocks"
GATHERS = "tests/gpu/test_block_ops.py::TestGather"
LAYOUTS = "tests/gpu/test_block_ops.py::TestLayout"
MERGE = "tests/gpu/test_merge.py"
MLA = "tests/gpu/test_block_ops.py::TestMla"
WRITES = "tests/gpu/test_cache_ops.py::TestCacheOps"

# Of merge_attn_states.cu.
READS = (
    "        if (mine) {\n"
    "            suffix_lse = lse_at(p.suffix_lse, p.suffix_lse_stride_head, p.suffix_lse_stride_token, token, head);\n"
    "            prefix_lse = lse_at(p.prefix_lse, p.prefix_lse_stride_head, p.prefix_lse_stride_token, token, head);\n"
    "            prefix = load_vector<WIDTH>(prefix_row + first_chunk * WIDTH);\n"
    "            suffix = load_vector<WIDTH>(suffix_row + first_chunk * WIDTH);\n"
    "        }\n"
)

MUTANTS = (
    Mutant(
        "an empty side is merged by its weight",
        "kernels/merge_attn_states.cu",
        "const bool suffix_only = !prefix_only && is_empty(prefix_lse);",
        "const bool suffix_only = false;",
        MERGE,
    ),
    Mutant(
        "a row takes the lse of its head's first token",
        "kernels/merge_attn_states.cu",
        "return lse[head * stride_head + token * stride_token];",
        "return lse[head * stride_head];",
        MERGE,
    ),
    Mutant(
        "the first token without a prefix is merged",
        "kernels/merge_attn_states.cu",
        "token < p.num_merged_tokens",
        "token <= p.num_merged_tokens",
        MERGE,
    ),
    Mutant(
        "skipped slots are written",
        "kernels/reshape_and_cache.cu",
        "if (slot < 0 || slot >= p.num_slots) return;",
        "if (slot < -1 || slot >= p.num_slots) return;",
        WRITES,
    ),
    Mutant(
        "k_scale in place of v_scale, written values",
        "kernels/reshape_and_cache.cu",
        "p.v_scale_array ? *p.v_scale_array : p.v_scale",
        "p.k_scale_array ? *p.k_scale_array : p.k_scale",
        WRITES,
    ),
    Mutant(
        "the last bytes of a block are not copied",
        "kernels/copy_blocks.cu",
        "(p.block_bytes + COPY_UNIT<WIDTH> - 1) / COPY_UNIT<WIDTH>",
        "p.block_bytes / COPY_UNIT<WIDTH>",
        COPIES,
    ),
    Mutant(
        "pairs from the host are read past their layer",
        "kernels/copy_blocks.cu",
        "p.pairs[copy / p.num_pools]",
        "p.pairs[copy % p.num_pairs]",
        COPIES,
    ),
    Mutant(
        "32-bit offset of a copied block",
        "kernels/copy_blocks.cu",
        "pool.blocks + source * pool.stride",
        "pool.blocks + int(source * pool.stride)",
        "tests/gpu/test_block_ops.py::test_copies_and_swaps_past_two_to_the_31_elements",
    ),
    Mutant(
        "a launch's first blocks go to and from the host again and again",
        "cupy_paged/block_runs.py",
        "short[start : start + MAX_PAIRS]",
        "short[:MAX_PAIRS]",
        SWAPS,
    ),
    Mutant(
        "a swapped block goes by the other side's step",
        "kernels/swap_blocks.cu",
        "pair.source * p.source_stride",
        "pair.source * p.destination_stride",
        SWAPS,
    ),
    Mutant(
        "a sequence is gathered from its table's first token",
        "kernels/gather_cache.cu",
        "(p.seq_starts ? p.seq_starts[seq] : 0)",
        "0",
        GATHERS,
    ),
    Mutant(
        "a token on a sequence's edge goes to its neighbour",
        "kernels/gather_cache.cu",
        "if (p.cu_seq_lens[middle] <= token) seq = middle;",
        "if (p.cu_seq_lens[middle] < token) seq = middle;",
        GATHERS,
    ),
    Mutant(
        "k_scale in place of v_scale, gathered values",
        "kernels/gather_cache.cu",
        "p.v_scale_array ? *p.v_scale_array : p.v_scale",
        "p.k_scale_array ? *p.k_scale_array : p.k_scale",
        GATHERS,
    ),
    Mutant(
        "rows past the end are gathered",
        "kernels/gather_cache.cu",
        "token >= p.num_tokens || ",
        "",
        GATHERS,
    ),
    Mutant(
        "tiles after the first of a block are not converted",
        "kernels/convert_layout.cu",
        "return first_token + token < BLOCK_SIZE;",
        "return first_token + token < TOKENS;",
        LAYOUTS,
    ),
    Mutant(
        "the values' last channels are not turned",
        "kernels/token_moves.cuh",
        "begin + channel >= HEAD_SIZE",
        "begin + channel >= HEAD_SIZE / 64 * 64",
        LAYOUTS,
    ),
    Mutant(
        "the rotary key is read from its second element",
        "kernels/concat_and_cache_mla.cu",
        "rotary + (i - p.kv_lora_rank)",
        "rotary + (i - p.kv_lora_rank + 1)",
        MLA,
    ),
    Mutant(
        "a merged log-sum-exp to base 2",
        "kernels/merge_attn_states.cu",
        ": logf(sum) + max;",
        ": log2f(sum) + max;",
        MERGE,
    ),
    Mutant(
        "the prefix gets the weight of the suffix",
        "kernels/merge_attn_states.cu",
        ": from_prefix[i] * (prefix_weight / sum) +",
        ": from_prefix[i] * (suffix_weight / sum) +",
        MERGE,
    ),
    Mutant(
        "+inf is no empty side",
        "kernels/merge_attn_states.cu",
        "return fabsf(lse) == -minus_infinity();",
        "return lse == minus_infinity();",
        MERGE,
    ),
    Mutant(
        "the output's scale is multiplied, not divided",
        "kernels/merge_attn_states.cu",
        "factor = 1.0f / (p.output_scale_array",
        "factor = 1.0f * (p.output_scale_array",
        MERGE,
    ),
    Mutant(
        "a row's lse is written while others still read it",
        "kernels/merge_attn_states.cu",
        READS
        + "        if constexpr (WARP % ROW_THREADS == 0) __syncwarp();\n        else __syncthreads();\n",
        "        if (threadIdx.x / WARP % 2) __nanosleep(100000);\n" + READS,  # as it might happen
        MERGE,
    ),
    Mutant(
        "the prefix's tokens go by the output's stride",
        "kernels/merge_attn_states.cu",
        "static_cast<const Input*>(p.prefix_output) + token * p.prefix_stride_token +",
        "static_cast<const Input*>(p.prefix_output) + token * p.output_stride_token +",
        MERGE,
    ),
    Mutant(
        "float8 is stored times its scale",
        "kernels/quantise.cuh",
        "from_float<Cache>(to_float(x) / scale);",
        "from_float<Cache>(to_float(x) * scale);",
        WRITES,
    ),
    Mutant(
        "float8 is stored by a multiplication with an inverse",
        "kernels/quantise.cuh",
        "from_float<Cache>(to_float(x) / scale);",
        "from_float<Cache>(to_float(x) * (1.0f / scale));",
        WRITES,
    ),
    Mutant(
        "slots past the end are written",
        "kernels/reshape_and_cache.cu",
        "if (slot < 0 || slot >= p.num_slots) return;",
        "if (slot < 0) return;",
        "tests/gpu/test_cache_ops.py::TestCacheOps::test_slots_past_the_end_are_skipped",
    ),
    Mutant(
        "offsets of tokens begin at the block's end",
        "kernels/reshape_and_cache.cu",
        "const int offset = int(slot % BLOCK_SIZE);",
        "const int offset = BLOCK_SIZE - 1 - int(slot % BLOCK_SIZE);",
        WRITES,
    ),
    Mutant(
        "values go by the keys' stride",
        "kernels/reshape_and_cache.cu",
        "static_cast<const Source*>(p.value) + token * p.value_stride_token +",
        "static_cast<const Source*>(p.value) + token * p.key_stride_head +",
        WRITES,
    ),
    Mutant(
        "float8 becomes float without its scale",
        "kernels/convert_fp8.cu",
        "is_float8<Output> ? x / scale : x * scale",
        "is_float8<Output> ? x / scale : x",
        "tests/gpu/test_cache_ops.py::TestConvert",
    ),
    Mutant(
        "float8 elements of the first round alone are converted",
        "kernels/convert_fp8.cu",
        "i < p.num_elements; i += step) {",
        "i < min(p.num_elements, step - 1); i += step) {",
        "tests/gpu/test_cache_ops.py::TestConvert",
    ),
    Mutant(
        "the last access of a block is left out",
        "kernels/block_copy.cuh",
        "if (at < block_bytes) store_bytes<WIDTH>(to + at, bytes[i]);",
        "if (at < block_bytes - WIDTH) store_bytes<WIDTH>(to + at, bytes[i]);",
        COPIES,
    ),
    Mutant(
        "negative blocks are copied from",
        "kernels/copy_blocks.cu",
        "if (source < 0 || source >= p.num_blocks ||",
        "if (source < -1 || source >= p.num_blocks ||",
        COPIES,
    ),
    Mutant(
        "a table's stride is its width",
        "kernels/gather_cache.cu",
        "p.block_tables[seq * p.table_stride + position / BLOCK_SIZE]",
        "p.block_tables[seq * (p.max_num_blocks_per_seq - 1) + position / BLOCK_SIZE]",
        GATHERS,
    ),
    Mutant(
        "a turned tile is read before it is written",
        "kernels/token_moves.cuh",
        "                    if (i < READS) column[j * Tile::PITCH] = held[k].element[j];\n            }\n            __syncthreads();\n",
        "                    if (i < READS) column[j * Tile::PITCH] = held[k].element[j];\n            }\n",
        LAYOUTS,
    ),
    Mutant(
        "gathered float8 loses its scale",
        "kernels/token_moves.cuh",
        "from_float<Target>(to_float(in.element[i]) * scale);",
        "from_float<Target>(to_float(in.element[i]));",
        GATHERS,
    ),
    Mutant(
        "a latent goes into its neighbour's block",
        "kernels/concat_and_cache_mla.cu",
        "slot / p.block_size * p.cache_stride_block +",
        "(slot + 1) / p.block_size * p.cache_stride_block +",
        MLA,
    ),
    Mutant(
        "bfloat16 is cut where it should be rounded, older chips",
        "kernels/dtypes.cuh",
        "return {uint16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};",
        "return {uint16(bits >> 16)};",
        CONVERSIONS,
    ),
    Mutant(
        "subnormal float8 have a spacing of their own, older chips",
        "kernels/dtypes.cuh",
        "max(int(__float_as_uint(magnitude) >> 23) - 127, MIN_EXPONENT)",
        "int(__float_as_uint(magnitude) >> 23) - 127",
        CONVERSIONS,
    ),
    Mutant(
        "float8_e4m3fn is 256 times too small, older chips",
        "kernels/dtypes.cuh",
        "to_float(float16{uint16(half)}) * 256.0f",
        "to_float(float16{uint16(half)})",
        CONVERSIONS,
    ),
    Mutant(
        "NaN of float8_e4m3fn is a number, older chips",
        "kernels/dtypes.cuh",
        "return magnitude == 0x7fu ? __uint_as_float(0x7fffffffu) : value;",
        "return value;",
        CONVERSIONS,
    ),
    Mutant(
        "NaN becomes a zero of bfloat16, older chips",
        "kernels/dtypes.cuh",
        "    if (x != x) return {0x7fff};\n",
        "",
        CONVERSIONS,
    ),
    Mutant(
        "float8 is cut where it should be rounded, older chips",
        "kernels/dtypes.cuh",
        "__float2int_rn(magnitude * per_spacing)",
        "__float2int_rz(magnitude * per_spacing)",
        CONVERSIONS,
    ),
    Mutant(
        "a block is swapped into the place that it has",
        "kernels/swap_blocks.cu",
        "pair.destination * p.destination_stride",
        "pair.source * p.destination_stride",
        SWAPS,
    ),
    Mutant(
        "a latent loses its scale",
        "kernels/concat_and_cache_mla.cu",
        "stored<Cache>(in.element[j], scale)",
        "stored<Cache>(in.element[j], 1.0f)",
        MLA,
    ),
    Mutant(
        "a gathered token is its block's first",
        "kernels/gather_cache.cu",
        "int(position % BLOCK_SIZE)}",
        "0}",
        GATHERS,
    ),
    Mutant(
        "a token without a prefix is merged with what is there",
        "kernels/merge_attn_states.cu",
        "        if (!has_prefix) prefix_lse = minus_infinity();\n",
        "",
        MERGE,
    ),
)
