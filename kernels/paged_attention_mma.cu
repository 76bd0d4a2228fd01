// paged_attention.cu on tensor cores, for sm_80 and later: the same function, the same partitions,
// the same parameters, and products of 16-bit operands with float32 sums.
//
// The scores of 16 tokens for 8 query heads are one 16 x 8 tile, keys being the 16-row operand: a
// group of up to 8 heads wastes nothing on padding it to 16. Their weights, transposed in registers,
// are the 8-column operand against values, [channels][tokens], whose sums again have a query head in
// every column.
//
// A warp is on its own: it takes every NUM_WARPS-th tile of a partition, fetches its tiles into its
// own ring of stages, some tiles ahead and across the ends of partitions, and keeps its own softmax
// state. Warps meet at the end of a partition, where their states are joined in a fixed order.
//
// Where a cache block is a tile, and lies in memory as the tile does, the bulk copy engine moves it
// (BULK); a tile whose last tokens are dead still goes piece by piece, to have zeros in their place.
#include "attention_params.cuh"
#include "bulk_copies.cuh"
#include "dtypes.cuh"
#include "layouts.cuh"
#include "masks.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "schedule.cuh"
#include "sinks.cuh"
#include "softmax.cuh"
#include "warp_tiles.cuh"

namespace cupy_paged {

// One partition of one KV head, and the query heads that it serves.
struct Piece {
    int seq, partition, kv_head, head, num_heads, seq_len, begin, end;
};

// A warp's way through the pieces of its thread block: blockIdx.x, then every gridDim.x-th.
template <int GROUP, class Sink> struct PieceWalk {
    const AttentionParams& p;
    PartitionWalk walk;
    int64 number;
    Piece piece;

    __device__ explicit PieceWalk(const AttentionParams& params)
        : p(params),
          walk{params.seq_lens, params.num_seqs, params.partition_size, params.max_seq_len, Sink::MIN_PARTITIONS},
          number(int64(blockIdx.x) - gridDim.x) {}

    __device__ bool next() {
        const int group_size = p.num_heads / p.num_kv_heads;
        const int tiles_per_group = ceil_div(group_size, GROUP);
        const int pieces_per_partition = p.num_kv_heads * tiles_per_group;
        number += gridDim.x;
        if (!walk.seek(number / pieces_per_partition)) return false;
        const int part = int(number % pieces_per_partition);
        const int head_in_group = part % tiles_per_group * GROUP;
        piece.seq = walk.seq;
        piece.partition = int(number / pieces_per_partition - walk.before);
        piece.kv_head = part / tiles_per_group;
        piece.head = piece.kv_head * group_size + head_in_group;
        piece.num_heads = min(GROUP, group_size - head_in_group);
        piece.seq_len = readable_tokens(p.seq_lens[walk.seq], p.max_seq_len);
        piece.begin = piece.partition * p.partition_size;
        piece.end = min(piece.begin + p.partition_size, piece.seq_len);
        return true;
    }
};

template <class Query, bool FLOAT8_CACHE> struct OperandOf {
    using type = Query;
};
template <class Query> struct OperandOf<Query, true> {
    using type = float16;
};

// The power of two that brings a number of this magnitude to between 1 and 2.
__device__ inline float shift_to_one(float magnitude) {
    const int exponent = min(max(int(__float_as_uint(magnitude) >> 23), 1), 253);
    return __uint_as_float(uint32(254 - exponent) << 23);
}

template <class KeyTile, class ValueTile> struct TilePair {
    KeyTile keys;
    ValueTile values;
};

template <class KeyTile, class ValueTile, int NUM_WARPS, int STAGES, int GROUP, int HEAD_SIZE> struct MmaShared {
    static constexpr int ROW = HEAD_SIZE + 4;  // keeps the lanes that write a sum in different banks

    TilePair<KeyTile, ValueTile> ring[NUM_WARPS][STAGES];
    ArrivalBarrier arrival[NUM_WARPS][STAGES];  // used where BULK
    float weighted[NUM_WARPS / 2][GROUP][ROW];
    float max[NUM_WARPS][GROUP], sum[NUM_WARPS][GROUP];
};

// Grid: any number of thread blocks. GROUP is 8 or 16 columns of query heads; those past the group
// count as zeros and are not written. SHARED_BYTES is the planner's figure for the shared memory.
template <class Query, class Cache, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int GROUP, int NUM_WARPS, int STAGES,
          bool BULK, int SHARED_BYTES, class Bias, class Sink>
__global__ void __launch_bounds__(NUM_WARPS* WARP, 2) paged_attention_mma(const AttentionParams p) {
    using KeyTile = TokenRows<Cache, HEAD_SIZE, Layout::KEYS_BY_TOKEN>;
    using ValueTile = typename WarpValues<Layout, Cache, HEAD_SIZE>::Tile;
    // float8 widens to float16, exactly. A bfloat16 query then follows, shifted into float16's range.
    using Operand = typename OperandOf<Query, is_float8<Cache>>::type;
    constexpr bool SHIFTED = !same_type<Query, Operand>;
    constexpr int NUM_THREADS = NUM_WARPS * WARP;
    constexpr int COLUMNS = GROUP / 8;  // tiles of 8 query heads
    constexpr int STEPS = HEAD_SIZE / 16;
    constexpr int PAIRS = STEPS / KeyTile::OPERANDS;
    static_assert(HEAD_SIZE % (16 * KeyTile::OPERANDS) == 0 && GROUP % 8 == 0, "operands must be whole");

    using Shared = MmaShared<KeyTile, ValueTile, NUM_WARPS, STAGES, GROUP, HEAD_SIZE>;
    static_assert(sizeof(Shared) <= SHARED_BYTES, "planner and kernel disagree on shared memory");
    extern __shared__ __align__(16) uint8 shared_memory[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int g = lane / 4, j = lane % 4;  // see mma.cuh
    const float logit_scale = p.scale * (p.k_scale_array ? *p.k_scale_array : p.k_scale);
    const float value_scale = p.v_scale_array ? *p.v_scale_array : p.v_scale;
    const Cache* key_cache = static_cast<const Cache*>(p.key_cache);
    const Cache* value_cache = static_cast<const Cache*>(p.value_cache);

    // ---- fetch, some tiles ahead ----
    uint32 by_bulk = 0, phases = 0;  // a bit a stage: how its tile comes, and its barrier's next phase
    if constexpr (BULK) {
        if (lane < STAGES) shared.arrival[warp][lane].init();
        __syncwarp();
    }
    PieceWalk<GROUP, Sink> ahead(p);
    int ahead_token = 0, ahead_block = 0;
    bool ahead_live = true;

    // Moves on to the next tile that is to be fetched, and looks up the blocks of its 16 tokens.
    const auto next_tile = [&](bool first) {
        ahead_token += NUM_WARPS * TILE_TOKENS;
        while (ahead_live && (first || ahead_token >= ahead.piece.end)) {
            first = false;
            ahead_live = ahead.next();
            ahead_token = ahead.piece.begin + warp * TILE_TOKENS;
        }
        const int token = ahead_token + lane;
        if (ahead_live && lane < TILE_TOKENS && token < ahead.piece.end)
            ahead_block = p.block_tables[ahead.piece.seq * p.block_tables_stride + token / BLOCK_SIZE];
    };
    const auto fetch = [&](int stage) {
        if (ahead_live) {
            const int offset = (ahead_token + lane) % BLOCK_SIZE, live = ahead.piece.end - ahead_token;
            const int64 key_base = Layout::template key<Cache, HEAD_SIZE, BLOCK_SIZE>(
                p.key_strides, ahead_block, ahead.piece.kv_head, offset, 0);
            const int64 value_base = Layout::template value<Cache, HEAD_SIZE, BLOCK_SIZE>(
                p.value_strides, ahead_block, ahead.piece.kv_head, offset, 0);
            const auto chunk_step = [](int c) {
                return Layout::template key<Cache, HEAD_SIZE, BLOCK_SIZE>({}, 0, 0, 0, c * KeyTile::CHUNK);
            };
            auto& tiles = shared.ring[warp][stage];
            if constexpr (BULK) {
                by_bulk &= ~(1u << stage);
                if (live >= TILE_TOKENS) {
                    by_bulk |= 1u << stage;
                    if (lane == 0) {
                        shared.arrival[warp][stage].expect(sizeof(tiles));
                        copy_bulk(&tiles.keys, key_cache + key_base, sizeof(tiles.keys), shared.arrival[warp][stage]);
                        copy_bulk(&tiles.values, value_cache + value_base, sizeof(tiles.values),
                                  shared.arrival[warp][stage]);
                    }
                    next_tile(false);
                    return;
                }
            }
            tiles.keys.fetch(key_cache, key_base, live, chunk_step);
            if constexpr (Layout::VALUES_BY_TOKEN)
                tiles.values.fetch(value_cache, value_base, live, [](int c) { return c * ValueTile::CHUNK; });
            else
                tiles.values.template fetch<BLOCK_SIZE>(value_cache, value_base, live);
            next_tile(false);
        }
        commit_copies();
    };
    next_tile(true);
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);

    int stage = 0;
    PieceWalk<GROUP, Sink> walk(p);
    while (walk.next()) {
        const Piece piece = walk.piece;

        // ---- the queries, as operands B of [channels][heads] ----
        uint32 query[COLUMNS][STEPS][2];
        float column_scale[COLUMNS][2];  // of the logits of heads 8 * n + 2 * j and the next
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            const int head = 8 * n + g;
            const Query* row = static_cast<const Query*>(p.query) + piece.seq * p.query_stride_seq +
                               (piece.head + head) * p.query_stride_head;
            float shift = 1.0f;
            if constexpr (SHIFTED) {
                float magnitude = 0.0f;
                for (int channel = j; channel < HEAD_SIZE && head < piece.num_heads; channel += 4)
                    magnitude = fmaxf(magnitude, fabsf(to_float(row[channel])));
                shift = shift_to_one(lanes_max<4>(magnitude));
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
                column_scale[n][i] =
                    SHIFTED ? logit_scale / __shfl_sync(ALL_LANES, shift, (2 * j + i) * 4) : logit_scale;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // float8 keys come four adjacent channels to a lane, see TokenRows::keys.
                    const int channel = 16 * step + (KeyTile::OPERANDS == 1 ? 2 * j + 8 * half : 4 * j + 2 * half);
                    const float low = head < piece.num_heads ? to_float(row[channel]) : 0.0f;
                    const float high = head < piece.num_heads ? to_float(row[channel + 1]) : 0.0f;
                    query[n][step][half] = SHIFTED ? pack<Operand>(low * shift, high * shift) : pack<Operand>(low, high);
                }
        }

        float max[COLUMNS][2], sum[COLUMNS][2];  // of heads 8 * n + 2 * j and the next
        float weighted[COLUMNS][STEPS][4] = {};
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
            for (int i = 0; i < 2; i++) max[n][i] = LOWEST, sum[n][i] = 0.0f;

        for (int first = piece.begin + warp * TILE_TOKENS; first < piece.end; first += NUM_WARPS * TILE_TOKENS) {
            if constexpr (BULK) {
                if (by_bulk >> stage & 1) {
                    shared.arrival[warp][stage].wait(phases >> stage & 1);
                    phases ^= 1u << stage;
                } else {
                    wait_for_copies();
                    fence_before_bulk();
                }
            } else {
                wait_for_copies_but<STAGES - 2>();
            }
            __syncwarp();
            fetch((stage + STAGES - 1) % STAGES);
            const auto& tiles = shared.ring[warp][stage];
            stage = (stage + 1) % STAGES;

            // ---- score ----
            float score[COLUMNS][4] = {};
            const int my_row = ValueTile::token_of_row(lane % TILE_TOKENS);
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                uint32 keys[KeyTile::OPERANDS][4];
                tiles.keys.keys(pair, my_row, keys);
#pragma unroll
                for (int i = 0; i < KeyTile::OPERANDS; i++)
#pragma unroll
                    for (int n = 0; n < COLUMNS; n++)
                        mma<Operand>(score[n], keys[i], query[n][pair * KeyTile::OPERANDS + i]);
            }

            // ---- mask, and fold into the softmax state ----
            uint32 weights[COLUMNS][2];
            float rescale[COLUMNS][2];
            bool moved = false;
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) {
                float weight[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int token = first + ValueTile::token_of_row(g + i / 2 * 8);
                    const int head = piece.head + min(8 * n + 2 * j + i % 2, piece.num_heads - 1);
                    const float logit = Bias::add(p, score[n][i] * column_scale[n][i % 2], head, token, piece.seq_len);
                    score[n][i] = token < piece.end ? logit : LOWEST;
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float highest = fmaxf(score[n][i], score[n][i + 2]);
#pragma unroll
                    for (int step = 4; step < WARP; step *= 2)
                        highest = fmaxf(highest, __shfl_xor_sync(ALL_LANES, highest, step));
                    const float new_max = fmaxf(max[n][i], highest);
                    moved |= new_max != max[n][i];
                    rescale[n][i] = exp_difference(max[n][i], new_max);
                    max[n][i] = new_max;
                    weight[i] = exp_difference(score[n][i], new_max);
                    weight[i + 2] = exp_difference(score[n][i + 2], new_max);
                    sum[n][i] = sum[n][i] * rescale[n][i] + (weight[i] + weight[i + 2]);
                }
                weights[n][0] = transpose_matrix(pack<Operand>(weight[0], weight[1]));
                weights[n][1] = transpose_matrix(pack<Operand>(weight[2], weight[3]));
            }
            // Most tiles leave every maximum where it is, and a factor of 1 changes no bit.
            if (__any_sync(ALL_LANES, moved))
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int step = 0; step < STEPS; step++)
#pragma unroll
                        for (int i = 0; i < 4; i++) weighted[n][step][i] *= rescale[n][i % 2];

#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                uint32 values[KeyTile::OPERANDS][4];
                tiles.values.values(pair, values);
#pragma unroll
                for (int i = 0; i < KeyTile::OPERANDS; i++)
#pragma unroll
                    for (int n = 0; n < COLUMNS; n++)
                        mma<Operand>(weighted[n][pair * KeyTile::OPERANDS + i], values[i], weights[n]);
            }
        }

        // ---- join the warps ----
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
#pragma unroll
                for (int step = 4; step < WARP; step *= 2) sum[n][i] += __shfl_xor_sync(ALL_LANES, sum[n][i], step);
                if (g == 0) {
                    shared.max[warp][8 * n + 2 * j + i] = max[n][i];
                    shared.sum[warp][8 * n + 2 * j + i] = sum[n][i];
                }
            }
        __syncthreads();
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int head = 8 * n + 2 * j + i;
                float highest = shared.max[0][head];
                for (int w = 1; w < NUM_WARPS; w++) highest = fmaxf(highest, shared.max[w][head]);
                const float rescale = exp_difference(max[n][i], highest);
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    weighted[n][step][i] *= rescale;
                    weighted[n][step][i + 2] *= rescale;
                }
            }
#pragma unroll
        for (int half = NUM_WARPS / 2; half >= 1; half /= 2) {
            const bool gives = warp >= half && warp < 2 * half;
            if (half < NUM_WARPS / 2) __syncthreads();
#pragma unroll
            for (int pass = 0; pass < 2; pass++) {
                if (pass == 0 ? gives : warp < half)
#pragma unroll
                    for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                        for (int step = 0; step < STEPS; step++)
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                float& joined = shared.weighted[warp % half][8 * n + 2 * j + i % 2]
                                                               [ValueTile::channel(step, g + i / 2 * 8)];
                                if (pass == 0) joined = weighted[n][step][i];
                                else if (half > 1) weighted[n][step][i] += joined;
                                else joined += weighted[n][step][i];
                            }
                __syncthreads();
            }
        }

        // ---- write ----
        for (int i = threadIdx.x; i < piece.num_heads * HEAD_SIZE; i += NUM_THREADS) {
            const int head = i / HEAD_SIZE, channel = i % HEAD_SIZE;
            float highest = shared.max[0][head], total = 0.0f;
            for (int w = 1; w < NUM_WARPS; w++) highest = fmaxf(highest, shared.max[w][head]);
            for (int w = 0; w < NUM_WARPS; w++) total += shared.sum[w][head] * exp_difference(shared.max[w][head], highest);
            const float mean = total == 0.0f ? 0.0f : shared.weighted[0][head][channel] / total * value_scale;
            Sink::template write<HEAD_SIZE>(p, piece.seq, piece.head + head, piece.partition, channel, mean);
            if (channel == 0)
                Sink::write_state(p, piece.seq, piece.head + head, piece.partition, highest, total,
                                  piece.end - piece.begin);
        }
        __syncthreads();
    }
    wait_for_copies();
}

}  // namespace cupy_paged
