"""Faults in the kernels of attention."""

# ruff: noqa: E501  (sources as they are)

from mutants.mutant import Mutant

SUITE = "tests/gpu/test_attention.py::TestAttention"
OLDER_CHIPS = "tests/gpu/test_attention.py::TestAttentionOnOlderChips"
ORACLE = "tests/gpu/test_attention.py::test_matches_oracle"
LONG = "tests/gpu/test_attention.py::test_needles_in_long_contexts"
BITWISE = "tests/gpu/test_bitwise.py"

AWAIT_TILE = "            shared.full[slot].wait(tile / SLOTS % 2);\n"
TO_THE_KEYS = """\
            if constexpr (BULK)
                if (first + TILE_TOKENS > end) {
                    tiles.values.clear_from(end - first);
                    fence_before_bulk();
                    __syncwarp();
                }

            // ---- score ----
            float score[4] = {};
            const int my_row = ValueTile::token_of_row(lane % TILE_TOKENS);
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                uint32 keys[KeyTile::OPERANDS][4];
                tiles.keys.keys(pair, my_row, keys);
"""
"""What a worker does from there until it has read a tile's keys."""

MUTANTS = (
    Mutant(
        "v_scale in place of k_scale, tensor cores",
        "kernels/workers.cuh",
        "(p.k_scale_array ? *p.k_scale_array : p.k_scale)",
        "(p.v_scale_array ? *p.v_scale_array : p.v_scale)",
        SUITE,
    ),
    Mutant(
        "v_scale in place of k_scale, CUDA cores",
        "kernels/paged_attention.cu",
        "(p.k_scale_array ? *p.k_scale_array : p.k_scale)",
        "(p.v_scale_array ? *p.v_scale_array : p.v_scale)",
        OLDER_CHIPS,
    ),
    Mutant(
        "the newest token is dropped, tensor cores",
        "kernels/pieces.cuh",
        "group_end = min((piece.node + 1) * tokens, piece.seq_len);",
        "group_end = min((piece.node + 1) * tokens, piece.seq_len - 1);",
        SUITE,
    ),
    Mutant(
        "the newest token is dropped, CUDA cores",
        "kernels/paged_attention.cu",
        "const int end = min(begin + partition_size, seq_len);",
        "const int end = min(begin + partition_size, seq_len - 1);",
        OLDER_CHIPS,
    ),
    Mutant(
        "32-bit block offset",
        "kernels/layouts.cuh",
        "return block * stride.block + head * stride.head + offset * stride.token + channel;",
        "return int(block * stride.block) + head * stride.head + offset * stride.token + channel;",
        "tests/gpu/test_large_pool.py",
    ),
    Mutant(
        "ALiBi distance off by one",
        "kernels/masks.cuh",
        "float(token - seq_len + 1)",
        "float(token - seq_len)",
        SUITE,
    ),
    Mutant(
        "dead slots of a channel are fetched, tensor cores",
        "kernels/warp_tiles.cuh",
        "min(max(live_tokens - column * CHUNK, 0), CHUNK) * int(sizeof(T))",
        "CHUNK * int(sizeof(T))",
        SUITE,
    ),
    Mutant(
        "dead slots of a block that came as a whole are not cleared, tensor cores",
        "kernels/warp_tiles.cuh",
        "if (i % TILE_TOKENS >= token) elements[i] = {};",
        "if (i % TILE_TOKENS > token) elements[i] = {};",
        SUITE,
    ),
    Mutant(
        "dead slots are fetched, CUDA cores",
        "kernels/tiles.cuh",
        "const int live = min(count, from.end - token);",
        "const int live = from.end > token - BLOCK_SIZE ? count : 0;",
        OLDER_CHIPS,
    ),
    Mutant(
        "counters of a launch are left to the next",
        "kernels/pieces.cuh",
        "p.work->arrivals[i] = 0",
        "p.work->arrivals[i] += 0",
        SUITE,
    ),
    Mutant(
        "nodes are counted before they are stored",
        "kernels/clerk.cuh",
        "order.stored.wait(parity);  // for every piece: synccheck takes a phase that nobody awaits for a fault",
        "",
        BITWISE,
    ),
    Mutant(
        "the last partition of a group is left out, where thread blocks did one each",
        "kernels/head_sum.cuh",
        "if (i < count) group[k].take(node[i]);",
        "if (i < count - 1) group[k].take(node[i]);",
        SUITE,
    ),
    Mutant(
        "a group is what its last partition comes to, where a thread block did all of it",
        "kernels/workers.cuh",
        "if (!piece.is_first) state = group[k].joined();",
        "",
        BITWISE,
    ),
    Mutant(
        "the slots of a batch are not awaited",
        "kernels/fetcher.cuh",
        "shared.empty[mine % SLOTS].wait(mine / SLOTS % 2 ^ 1);",
        "",
        "tests/gpu/test_attention.py::test_long_contexts",
    ),
    Mutant(
        "heads of a group are swapped, CUDA cores",
        "kernels/paged_attention.cu",
        "const int64 at = seq * p.query_stride_seq + (head + h) * p.query_stride_head + channel;",
        "const int64 at = seq * p.query_stride_seq + (head + num_heads - 1 - min(h, num_heads - 1)) * p.query_stride_head + channel;",
        OLDER_CHIPS,
    ),
    Mutant(
        "heads of a group are swapped, tensor cores",
        "kernels/fetcher.cuh",
        "query + (there ? head : 0) * p.query_stride_head + channel,",
        "query + (there ? piece.num_heads - 1 - head : 0) * p.query_stride_head + channel,",
        SUITE,
    ),
    Mutant(
        "keys are those of the next KV head, tensor cores",
        "kernels/fetcher.cuh",
        "(p.key_strides, block, piece.kv_head, offset, 0);",
        "(p.key_strides, block, (piece.kv_head + 1) % p.num_kv_heads, offset, 0);",
        SUITE,
    ),
    Mutant(
        "values are those of the next KV head, CUDA cores",
        "kernels/paged_attention.cu",
        "            from.stride = p.value_strides;\n",
        "            from.stride = p.value_strides;\n            from.kv_head = (kv_head + 1) % p.num_kv_heads;\n",
        OLDER_CHIPS,
    ),
    Mutant(
        "log-sum-exp to base 2",
        "kernels/softmax.cuh",
        "minus_infinity() : logf(sum) + max;",
        "minus_infinity() : log2f(sum) + max;",
        SUITE,
    ),
    Mutant(
        "weights to base 2",
        "kernels/softmax.cuh",
        "return exp2f((x - reference) * LOG2_E);",
        "return exp2f(x - reference);",
        SUITE,
    ),
    Mutant(
        "sign of ALiBi",
        "kernels/masks.cuh",
        "return logit + p.alibi_slopes[head]",
        "return logit - p.alibi_slopes[head]",
        ORACLE,
    ),
    Mutant(
        "sliding offset of sparse heads without the rank's first head",
        "kernels/masks.cuh",
        "(params.tp_rank * params.num_heads + head) * step + 1",
        "head * step + 1",
        ORACLE,
    ),
    Mutant(
        "the newest local block is left out",
        "kernels/masks.cuh",
        "return block > newest_block - params.sparse_local_blocks ||",
        "return block > newest_block - params.sparse_local_blocks + 1 ||",
        ORACLE,
    ),
    Mutant(
        "tokens past the end are not masked, CUDA cores",
        "kernels/paged_attention.cu",
        "const bool live = token < end && mask.attends(",
        "const bool live = mask.attends(",
        OLDER_CHIPS,
    ),
    Mutant(
        "tokens past the end are not masked, tensor cores",
        "kernels/workers.cuh",
        "score[i] = token < end ? logit : LOWEST;",
        "score[i] = logit;",
        SUITE,
    ),
    Mutant(
        "values that another head asked for are not masked",
        "kernels/paged_attention.cu",
        "if (Mask::BY_HEAD && weight[j] == 0.0f) continue;",
        "",
        SUITE,
    ),
    Mutant(
        "dead values of a row are fetched, tensor cores",
        "kernels/warp_tiles.cuh",
        "copy_async_once(at(t, c), token + chunk_step(c), t < live_tokens ? 16 : 0);",
        "copy_async_once(at(t, c), token + chunk_step(c), 16);",
        SUITE,
    ),
    Mutant(
        "a window's blocks are those of the window before, tensor cores",
        "kernels/fetcher.cuh",
        "if (end < piece.end) look_up(piece, end);",
        "if (end < piece.end) look_up(piece, window);",
        LONG,
    ),
    Mutant(
        "a tile's blocks are those of the tile before, CUDA cores",
        "kernels/paged_attention.cu",
        "            keep_block(tile, block_after_next);\n",
        "",
        OLDER_CHIPS,
    ),
    Mutant(
        "a block table's row is its neighbour's, CUDA cores",
        "kernels/paged_attention.cu",
        "p.block_tables[seq * p.block_tables_stride + block] : 0",
        "p.block_tables[seq / 2 * 2 * p.block_tables_stride + block] : 0",
        OLDER_CHIPS,
    ),
    Mutant(
        "a tile is read before its copies have come, CUDA cores",
        "kernels/paged_attention.cu",
        "            wait_for_copies();\n            __syncthreads();\n            if (STAGES > 1",
        "            __syncthreads();\n            if (STAGES > 1",
        SUITE,
    ),
    Mutant(
        "sums are not rescaled to a new maximum, CUDA cores",
        "kernels/paged_attention.cu",
        "shared.sum[h] = shared.sum[h] * rescale + sum;",
        "shared.sum[h] += sum;",
        OLDER_CHIPS,
    ),
    Mutant(
        "values are not rescaled to a new maximum, tensor cores",
        "kernels/workers.cuh",
        "weighted[step][i] *= rescale[i % 2];",
        "weighted[step][i] *= rescale[0];",
        SUITE,
    ),
    Mutant(
        "sums are not rescaled to a new maximum, tensor cores",
        "kernels/workers.cuh",
        "sum[i] = sum[i] * rescale[i] + (weight[i] + weight[i + 2]);",
        "sum[i] += weight[i] + weight[i + 2];",
        SUITE,
    ),
    Mutant(
        "two rows of a tile are exchanged",
        "kernels/workers.cuh",
        "const int token = first + ValueTile::token_of_row(g + i / 2 * 8);",
        "const int token = first + ValueTile::token_of_row((g ^ 1) + i / 2 * 8);",
        SUITE,
    ),
    Mutant(
        "a worker's state is left out of the join",
        "kernels/warp_states.cuh",
        "joined.sum += sum[w][head] * rescale;",
        "joined.sum += w == 1 ? 0.0f : sum[w][head] * rescale;",
        SUITE,
    ),
    Mutant(
        "states of workers are joined at their own maximum",
        "kernels/warp_states.cuh",
        "const float rescale = exp_difference(max[w][head], joined.max);",
        "const float rescale = 1.0f;",
        SUITE,
    ),
    Mutant(
        "partitions are joined at their own maximum",
        "kernels/warp_states.cuh",
        "const float weight = __fmul_rn(state.sum, exp_difference(state.max, new_max));",
        "const float weight = state.sum;",
        SUITE,
    ),
    Mutant(
        "partitions are joined by their number, CUDA cores",
        "kernels/combine_partitions.cu",
        "weight[threadIdx.x] = exp_sums[mine] * exp_difference(max_logits[mine], max);",
        "weight[threadIdx.x] = exp_difference(max_logits[mine], max);",
        OLDER_CHIPS,
    ),
    Mutant(
        "the last partition is left out, CUDA cores",
        "kernels/combine_partitions.cu",
        "const int count = min(NUM_THREADS, num_partitions - first);",
        "const int count = min(NUM_THREADS, num_partitions - first - 1);",
        OLDER_CHIPS,
    ),
    Mutant(
        "a partition begins one token late",
        "kernels/pieces.cuh",
        "end_piece(piece.node * tokens);",
        "end_piece(piece.node ? piece.node * tokens + 1 : 0);",
        SUITE,
    ),
    Mutant(
        "a sequence of exactly 64 partitions keeps its partition size",
        "kernels/schedule.cuh",
        "size * ENOUGH_PARTITIONS <= seq_len) size *= 2;",
        "size * ENOUGH_PARTITIONS < seq_len) size *= 2;",
        BITWISE,
    ),
    Mutant(
        "a sequence longer than its table is read",
        "kernels/schedule.cuh",
        "return seq_len <= max_seq_len ? max(seq_len, 0) : 0;",
        "return max(min(seq_len, max_seq_len), 0);",
        SUITE,
    ),
    Mutant(
        "a sequence longer than its table gives zeros, tensor cores",
        "kernels/results.cuh",
        "from_float<Query>(piece.fits ? state.mean[c] : not_a_number())",
        "from_float<Query>(state.mean[c])",
        SUITE,
    ),
    Mutant(
        "a sequence longer than its table gives zeros, CUDA cores",
        "kernels/sinks.cuh",
        "from_float<Query>(fits ? value : not_a_number());",
        "from_float<Query>(value);",
        OLDER_CHIPS,
    ),
    Mutant(
        "a partition hidden whole keeps no token count",
        "kernels/sinks.cuh",
        "p.exp_sums[slot] = sum == 0.0f ? float(num_tokens) : sum;",
        "p.exp_sums[slot] = sum;",
        OLDER_CHIPS,
    ),
    Mutant(
        "out is written by the query's stride, tensor cores",
        "kernels/results.cuh",
        "static_cast<Query*>(p.out) + piece.seq * p.out_stride_seq +",
        "static_cast<Query*>(p.out) + piece.seq * p.query_stride_seq +",
        SUITE,
    ),
    Mutant(
        "keys of a block lie as its channels do, layout vllm",
        "kernels/layouts.cuh",
        "(channel / X * BLOCK_SIZE + offset) * X + channel % X;",
        "(offset * (HEAD_SIZE / X) + channel / X) * X + channel % X;",
        ORACLE,
    ),
    Mutant(
        "v_scale is left out, tensor cores",
        "kernels/warp_states.cuh",
        "joined.sum == 0.0f ? 0.0f : value_scale / joined.sum;",
        "joined.sum == 0.0f ? 0.0f : 1.0f / joined.sum;",
        ORACLE,
    ),
    Mutant(
        "bytes past the live ones arrive, CUDA cores",
        "kernels/copies.cuh",
        "else if (keep < 32) words.word[i] &= (1u << keep) - 1;",
        "",
        OLDER_CHIPS,
    ),
    Mutant(
        "every node of a step has the maximum of the first",
        "kernels/nodes.cuh",
        "p.max_logits + first + lane, 4",
        "p.max_logits + first, 4",
        "tests/gpu/test_attention.py::test_long_contexts",
    ),
    Mutant(
        "a row is summed up before the last of its nodes is there",
        "kernels/nodes.cuh",
        "return before == uint32(expected - 1);",
        "return before == uint32(max(expected - 2, 0));",
        SUITE,
    ),
    Mutant(
        "bytes of float8_e5m2 change places, tensor cores",
        "kernels/mma.cuh",
        "0x1404",
        "0x0414",
        SUITE,
    ),
    Mutant(
        "the second lane does not count the steps before it",
        "kernels/reduce.cuh",
        "if (lane >= step) x += before;",
        "if (lane > step) x += before;",
        SUITE,
    ),
    Mutant(
        "of two float8 the first is taken twice, CUDA cores",
        "kernels/dtypes.cuh",
        "out[i + 1] = to_float(float16{uint16(halves >> 16)});",
        "out[i + 1] = to_float(float16{uint16(halves)});",
        ORACLE,
    ),
    Mutant(
        "a tile is read before it has come, tensor cores",
        "kernels/workers.cuh",
        # It is awaited before it is given back: else kernels hang, and no test ever ends.
        AWAIT_TILE + TO_THE_KEYS,
        TO_THE_KEYS + "                if (pair + 1 == PAIRS) " + AWAIT_TILE.lstrip(),
        SUITE,
    ),
    Mutant(
        "draws of a launch are left to the next",
        "kernels/pieces.cuh",
        "p.work->pieces_taken = p.work->blocks_gone = 0;",
        "p.work->blocks_gone = 0;",
        BITWISE,
    ),
    Mutant(
        "the last heads of a group have those of the next beside them",
        "kernels/pieces.cuh",
        "min(HEADS, p.group_size - head_in_group)",
        "HEADS",
        ORACLE,
    ),
    Mutant(
        "a row is its last group, where thread blocks did groups",
        "kernels/head_sum.cuh",
        "add_group(k, node[i], first + i == 0);",
        "add_group(k, node[i], true);",
        BITWISE,
    ),
    Mutant(
        "the lse of a row longer than its table is finite, tensor cores",
        "kernels/results.cuh",
        "piece.fits ? log_sum_exp(state.max, state.sum) : not_a_number();",
        "log_sum_exp(state.max, state.sum);",
        SUITE,
    ),
    Mutant(
        "a bfloat16 query beyond float16 is not shifted",
        "kernels/workers.cuh",
        "        shift = shift_to_one(lanes_max<4>(magnitude));\n",
        "",
        SUITE,
    ),
    Mutant(
        "odd heads are shifted back as their neighbours",
        "kernels/workers.cuh",
        "__shfl_sync(ALL_LANES, shift, (2 * j + i) * 4)",
        "__shfl_sync(ALL_LANES, shift, 2 * j * 4)",
        SUITE,
    ),
    Mutant(
        "of a pair of workers one counts",
        "kernels/workers.cuh",
        "left = alone ? mine : left + mine;",
        "left = mine;",
        ORACLE,
    ),
    Mutant(
        "float8 values' tokens are taken in order, layout vllm",
        "kernels/warp_tiles.cuh",
        "return OPERANDS == 1 ? row : row % 8 / 2 * 4 + row % 2 + row / 8 * 2;",
        "return row;",
        ORACLE,
    ),
    Mutant(
        "float8 values' channels are taken in order, other layouts",
        "kernels/warp_tiles.cuh",
        "return 16 * n + (OPERANDS == 1 ? row : row % 8 * 2 + row / 8);",
        "return 16 * n + row;",
        ORACLE,
    ),
    Mutant(
        "sliding heads of a group have the sign of the others",
        "kernels/masks.cuh",
        "kv_head) * -step + 1;",
        "kv_head) * step + 1;",
        ORACLE,
    ),
    Mutant(
        "tokens are fetched for the first head of a group alone",
        "kernels/masks.cuh",
        "h < head + num_heads; h++",
        "h < head + 1; h++",
        ORACLE,
    ),
    Mutant(
        "the lse of a row without tokens is 0, CUDA cores",
        "kernels/combine_partitions.cu",
        "fits ? minus_infinity() : filler;",
        "filler;",
        ORACLE,
    ),
    Mutant(
        "steps of sequences past the first 32 begin again",
        "kernels/schedule.cuh",
        "through = __shfl_sync(ALL_LANES, through, WARP - 1) + lanes_prefix_sum(count);",
        "through = lanes_prefix_sum(count);",
        BITWISE,
    ),
    Mutant(
        "32-bit offset of a block's values, layout vllm",
        "kernels/layouts.cuh",
        "return block * stride.block + head * stride.head + channel * BLOCK_SIZE + offset;",
        "return int(block * stride.block) + head * stride.head + channel * BLOCK_SIZE + offset;",
        "tests/gpu/test_large_pool.py",
    ),
)
