// paged_attention.cu on tensor cores, for sm_80 and later: products of 16-bit operands, float32 sums.
//
// The scores of 16 tokens for 8 query heads are one 16 x 8 tile, keys being the 16-row operand: a
// group of up to 8 heads wastes nothing on padding it to 16. Their weights, transposed in registers,
// are the 8-column operand against values, [channels][tokens], whose sums again have a query head in
// every column.
//
// Under load every access to global memory waits behind the cache that streams by, so no warp that
// computes makes one that it has to wait for. Warps have roles:
//
//   the fetcher   walks over the pieces of the thread block, looks up blocks, and copies queries and
//                 tiles of 16 tokens into rings in shared memory, as far ahead as there is room
//   the workers   take every NUM_WORKERS-th tile of a piece, each with a softmax state of its own, join
//                 their states at its end in a fixed order, and write the result, or a partition of it
//   the clerk     counts the partitions that have been written, and tells the workers when all those of
//                 a sequence are there for them to sum up
//
// Where a cache block is a tile, and lies in memory as the tile does, the bulk copy engine moves it (BULK).
#include "attention_params.cuh"
#include "barriers.cuh"
#include "dtypes.cuh"
#include "layouts.cuh"
#include "masks.cuh"
#include "mma.cuh"
#include "partition_states.cuh"
#include "pieces.cuh"
#include "reduce.cuh"
#include "softmax.cuh"
#include "warp_states.cuh"
#include "warp_tiles.cuh"

namespace cupy_paged {

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

// A piece on its way from the fetcher to all others.
template <class Query, int HEADS, int HEAD_SIZE> struct alignas(16) Order {
    static constexpr int ROW = HEAD_SIZE + 8;  // keeps the lanes that read an operand in different banks

    Query query[HEADS][ROW];
    Piece piece;
    uint32 first_tile;  // counted over all pieces of the thread block
    bool is_last;       // there is no such piece, and none will follow
    Barrier full, stored, empty;
};

template <class Tiles, class Query, int NUM_WORKERS, int SLOTS, int HEADS, int HEAD_SIZE> struct alignas(16) MmaShared {
    static constexpr int ORDERS = 3;
    static constexpr int JOBS = 2 * ORDERS;  // the clerk is never further behind than the orders reach

    Tiles tiles[SLOTS];
    Order<Query, HEADS, HEAD_SIZE> order[ORDERS];
    union {
        WarpStates<NUM_WORKERS / 2, HEADS, HEAD_SIZE> pairs;  // of workers
        WarpStates<NUM_WORKERS, HEADS_AT_ONCE<HEADS, HEAD_SIZE>, HEAD_SIZE> sums;
    };
    float max[NUM_WORKERS][HEADS];
    Piece job[JOBS];
    Barrier full[SLOTS], empty[SLOTS], clerk_done;
    int jobs_posted, jobs_seen;
};

template <class KeyTile, class ValueTile> struct TilePair {
    KeyTile keys;
    ValueTile values;
};

// The joined state of a piece, as a partition in scratch memory.
template <class Scratch, int HEAD_SIZE, int NUM_THREADS, class States>
__device__ inline void write_partition(const AttentionParams& p, const Piece& piece, const States& states, float scale) {
    for (int i = threadIdx.x * 4; i < piece.num_heads * HEAD_SIZE; i += NUM_THREADS * 4) {
        const int head = i / HEAD_SIZE, channel = i % HEAD_SIZE;
        const auto joined = states.join(head, channel);
        const int64 slot = (int64(piece.seq) * p.num_heads + piece.head + head) * p.max_partitions + piece.partition;
        Vector<Scratch, 4> mean;
#pragma unroll
        for (int c = 0; c < 4; c++) mean.element[c] = from_float<Scratch>(joined.mean[c] * scale);
        store_vector(static_cast<Scratch*>(p.tmp_out) + slot * HEAD_SIZE + channel, mean);
        if (channel == 0) p.max_logits[slot] = joined.max, p.exp_sums[slot] = joined.sum;
    }
}

// Four channels of a sequence's result, and its lse. A sequence longer than its table gives NaN: loud,
// where leaving tokens out would be silently wrong.
template <class Query>
__device__ inline void write_channels(const AttentionParams& p, const Piece& piece, int head_of_piece, int channel,
                                      const JoinedState& joined, float scale) {
    const int head = piece.head + head_of_piece;
    Query* out = static_cast<Query*>(p.out) + piece.seq * p.out_stride_seq + head * p.out_stride_head + channel;
#pragma unroll
    for (int c = 0; c < 4; c++) out[c] = from_float<Query>(piece.fits ? joined.mean[c] * scale : not_a_number());
    if (channel == 0 && p.lse)
        p.lse[int64(piece.seq) * p.num_heads + head] =
            piece.fits ? log_sum_exp(joined.max, joined.sum) : not_a_number();
}

// Joined states of a whole sequence, of up to HEADS heads from `first_head` on, as its result.
template <class Query, int HEADS, int HEAD_SIZE, int NUM_THREADS, class States>
__device__ inline void write_result(const AttentionParams& p, const Piece& piece, int first_head, const States& states,
                                    float scale) {
    for (int i = threadIdx.x * 4; i < min(HEADS, piece.num_heads - first_head) * HEAD_SIZE; i += NUM_THREADS * 4)
        write_channels<Query>(p, piece, first_head + i / HEAD_SIZE, i % HEAD_SIZE,
                              states.join(i / HEAD_SIZE, i % HEAD_SIZE), scale);
}

// Takes the sum of one warp straight into the result.
template <class Query> struct WarpResult {
    const AttentionParams& p;
    const Piece& piece;
    int first_head;

    __device__ void take(int /*warp*/, int head, int channel, float max, float sum, const float (&weighted)[4]) const {
        JoinedState joined{max, sum, {}};
#pragma unroll
        for (int c = 0; c < 4; c++) joined.mean[c] = weighted[c] / sum;
        write_channels<Query>(p, piece, first_head + head, channel, joined, 1.0f);
    }
};

// ---- the fetcher ----

template <class Query, class Cache, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int HEADS, int SLOTS, bool BULK,
          int QUERY_COPY_BYTES, class Tiles, class Shared>
__device__ inline void fetch_pieces(const AttentionParams& p, Shared& shared) {
    // Of the block table the warp keeps what a window of tokens takes, IDS block ids a lane: one more block
    // than has room in the window, which may begin and end within a block.
    constexpr int WINDOW = 256;
    constexpr int IDS = ceil_div(WINDOW / BLOCK_SIZE + 2, WARP);
    constexpr int CHUNK = 16 / sizeof(Cache);
    constexpr int COPY = QUERY_COPY_BYTES / sizeof(Query);
    const int lane = threadIdx.x % WARP;
    const Cache* key_cache = static_cast<const Cache*>(p.key_cache);
    const Cache* value_cache = static_cast<const Cache*>(p.value_cache);

    // Windows of the block table, one ahead: by the time that one is wanted, its ids have come.
    int ids[IDS];
    const auto look_up = [&](const Piece& piece, int token) {
#pragma unroll
        for (int i = 0; i < IDS; i++) {
            const int block = token / BLOCK_SIZE + i * WARP + lane;
            if (block * int64(BLOCK_SIZE) < piece.end)
                ids[i] = p.block_tables[piece.seq * p.block_tables_stride + block];
        }
    };

    PieceWalk<HEADS> walk(p);
    const auto look_up_next = [&] {
        const bool there = walk.next();
        if (there) look_up(walk.piece, walk.piece.begin);
        return there;
    };
    bool more = look_up_next();
    __syncthreads();  // the barriers are ready

    uint32 tile = 0;
    for (uint32 number = 0;; number++) {
        const Piece piece = walk.piece;
        auto& order = shared.order[number % Shared::ORDERS];
        order.empty.wait(number / Shared::ORDERS % 2 ^ 1);
        if (more) {
            const Query* query = static_cast<const Query*>(p.query) + piece.seq * p.query_stride_seq +
                                 piece.head * p.query_stride_head;
            for (int i = lane * COPY; i < HEADS * HEAD_SIZE; i += WARP * COPY) {
                const int head = i / HEAD_SIZE, channel = i % HEAD_SIZE;
                const bool there = head < piece.num_heads;
                copy_async<QUERY_COPY_BYTES>(&order.query[head][channel],
                                             query + (there ? head : 0) * p.query_stride_head + channel,
                                             there ? QUERY_COPY_BYTES : 0);
            }
        }
        if (lane == 0) {
            order.piece = piece;
            order.first_tile = tile;
            order.is_last = !more;
        }
        order.full.arrive_after_copies();
        order.full.arrive();
        if (!more) break;

        for (int window = piece.begin; window < piece.end; window += WINDOW) {
            int id[IDS];
#pragma unroll
            for (int i = 0; i < IDS; i++) id[i] = ids[i];
            const int end = min(window + WINDOW, piece.end);
            // The next piece: half a window to learn its number, half a window for its ids to come.
            const int halfway = end < piece.end ? end : max(window, (end - WINDOW / 2) / TILE_TOKENS * TILE_TOKENS);
            if (end < piece.end) look_up(piece, end);
            else walk.draw();

            for (int token = window; token < end; token += TILE_TOKENS, tile++) {
                if (token == halfway) more = look_up_next();
                const int mine = min(token + lane % TILE_TOKENS, piece.end - 1);
                const int position = mine / BLOCK_SIZE - window / BLOCK_SIZE;
                int block = 0;
#pragma unroll
                for (int i = 0; i < IDS; i++) {
                    const int found = __shfl_sync(ALL_LANES, id[i], position % WARP);
                    if (position / WARP == i) block = found;
                }
                const int offset = mine % BLOCK_SIZE, live = piece.end - token;
                const int64 key_base =
                    Layout::template key<Cache, HEAD_SIZE, BLOCK_SIZE>(p.key_strides, block, piece.kv_head, offset, 0);
                const int64 value_base = Layout::template value<Cache, HEAD_SIZE, BLOCK_SIZE>(p.value_strides, block,
                                                                                              piece.kv_head, offset, 0);
                const int slot = tile % SLOTS;
                Tiles& tiles = shared.tiles[slot];
                Barrier& full = shared.full[slot];
                shared.empty[slot].wait(tile / SLOTS % 2 ^ 1);
                if constexpr (BULK) {
                    if (lane == 0) {
                        full.arrive_expecting(sizeof(tiles));
                        copy_bulk(&tiles.keys, key_cache + key_base, sizeof(tiles.keys), full);
                        copy_bulk(&tiles.values, value_cache + value_base, sizeof(tiles.values), full);
                    }
                } else {
                    tiles.keys.fetch(key_cache, key_base, live, [](int c) {
                        return Layout::template key<Cache, HEAD_SIZE, BLOCK_SIZE>({}, 0, 0, 0, c * CHUNK);
                    });
                    if constexpr (Layout::VALUES_BY_TOKEN)
                        tiles.values.fetch(value_cache, value_base, live, [](int c) { return c * CHUNK; });
                    else
                        tiles.values.template fetch<BLOCK_SIZE>(value_cache, value_base, live);
                    full.arrive_after_copies();
                }
            }
        }
        if (piece.begin >= piece.end) {
            walk.draw();
            more = look_up_next();
        }
    }
    walk.leave();
    wait_for_copies();
}

// ---- the clerk ----

// A warp can sum up so many partitions by itself before anybody would miss it. Where there are more, it
// takes all workers. Sums are in another order then, but which it is follows from the number alone.
constexpr int FEW_PARTITIONS = 4;

template <class Query, class Scratch, int HEADS, int HEAD_SIZE, class Shared>
__device__ inline void count_partitions(const AttentionParams& p, Shared& shared) {
    constexpr int AT_ONCE = HEADS_AT_ONCE<HEADS, HEAD_SIZE>;
    const int lane = threadIdx.x % WARP;
    int posted = 0;
    for (uint32 number = 0;; number++) {
        auto& order = shared.order[number % Shared::ORDERS];
        const uint32 parity = number / Shared::ORDERS % 2;
        order.full.wait(parity);
        if (order.is_last) break;
        const Piece piece = order.piece;
        if (piece.num_partitions > 1) {
            order.stored.wait(parity);
            bool is_last = false;
            if (lane == 0) is_last = arrive_last(p.work->arrivals + piece.counter, piece.num_partitions);
            is_last = __shfl_sync(ALL_LANES, int(is_last), 0);
            __syncwarp();  // what the first lane has seen, all may read
            if (is_last) {
                if (piece.num_partitions <= FEW_PARTITIONS) {
                    for (int head = 0; head < piece.num_heads; head += AT_ONCE) {
                        const WarpResult<Query> result{p, piece, head};
                        sum_partitions<Scratch, 1, AT_ONCE, HEAD_SIZE>(p, result, piece, head, 0);
                    }
                } else if (lane == 0) {
                    shared.job[posted % Shared::JOBS] = piece;
                    __threadfence_block();
                    *const_cast<volatile int*>(&shared.jobs_posted) = ++posted;
                }
            }
        }
        __syncwarp();
        if (lane == 0) order.empty.arrive();
    }
    if (lane == 0) shared.clerk_done.arrive();
}

// Grid: any number of thread blocks. HEADS query heads of one KV head to a piece. SHARED_BYTES is the
// planner's figure for the shared memory, BLOCKS_PER_SM what it is to allow.
template <class Query, class Cache, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int HEADS, int NUM_WORKERS, int SLOTS,
          bool BULK, int QUERY_COPY_BYTES, int SHARED_BYTES, int BLOCKS_PER_SM, class Bias, class Scratch>
__global__ void __launch_bounds__((NUM_WORKERS + 2) * WARP, BLOCKS_PER_SM)
    paged_attention_mma(const __grid_constant__ AttentionParams p) {
    using KeyTile = TokenRows<Cache, HEAD_SIZE, Layout::KEYS_BY_TOKEN>;
    using ValueTile = typename WarpValues<Layout, Cache, HEAD_SIZE>::Tile;
    using Tiles = TilePair<KeyTile, ValueTile>;
    // float8 widens to float16, exactly. A bfloat16 query then follows, shifted into float16's range.
    using Operand = typename OperandOf<Query, is_float8<Cache>>::type;
    constexpr bool SHIFTED = !same_type<Query, Operand>;
    constexpr int NUM_THREADS = NUM_WORKERS * WARP;  // that work
    constexpr int COLUMNS = ceil_div(HEADS, 8);      // tiles of 8 query heads
    constexpr int STEPS = HEAD_SIZE / 16;
    constexpr int PAIRS = STEPS / KeyTile::OPERANDS;
    static_assert(HEAD_SIZE % (16 * KeyTile::OPERANDS) == 0, "operands must be whole");

    // A slot's tiles all go to one worker, or a worker could meet the slot a whole round too early.
    static_assert(SLOTS % NUM_WORKERS == 0, "slots must be the workers' own");

    using Shared = MmaShared<Tiles, Query, NUM_WORKERS, SLOTS, HEADS, HEAD_SIZE>;
    static_assert(sizeof(Shared) <= SHARED_BYTES, "planner and kernel disagree on shared memory");
    extern __shared__ __align__(128) uint8 shared_memory[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (warp == 0) {
        for (int i = lane; i < SLOTS; i += WARP) {
            shared.full[i].init(BULK ? 1 : WARP);
            shared.empty[i].init(1);
        }
        if (lane < Shared::ORDERS) {
            shared.order[lane].full.init(2 * WARP);
            shared.order[lane].stored.init(NUM_WORKERS);
            shared.order[lane].empty.init(NUM_WORKERS + 1);
        }
        if (lane == 0) {
            shared.clerk_done.init(1);
            shared.jobs_posted = 0;
        }
        Barrier::publish();
    }
    // The fetcher looks for work meanwhile, and comes to the same barrier.
    if (warp == NUM_WORKERS)
        return fetch_pieces<Query, Cache, Layout, HEAD_SIZE, BLOCK_SIZE, HEADS, SLOTS, BULK, QUERY_COPY_BYTES, Tiles>(
            p, shared);
    __syncthreads();
    if (warp == NUM_WORKERS + 1) return count_partitions<Query, Scratch, HEADS, HEAD_SIZE>(p, shared);

    // ---- the workers ----
    const int g = lane / 4, j = lane % 4;  // see mma.cuh
    const float logit_scale = p.scale * (p.k_scale_array ? *p.k_scale_array : p.k_scale);
    const float value_scale = p.v_scale_array ? *p.v_scale_array : p.v_scale;
    int jobs_done = 0;
    const auto do_jobs = [&](int jobs) {
        constexpr int AT_ONCE = HEADS_AT_ONCE<HEADS, HEAD_SIZE>;
        for (; jobs_done < jobs; jobs_done++) {
            const Piece job = shared.job[jobs_done % Shared::JOBS];
            for (int head = 0; head < job.num_heads; head += AT_ONCE) {
                sync_warps<1, NUM_THREADS>();
                sum_partitions<Scratch, NUM_WORKERS, AT_ONCE, HEAD_SIZE>(p, shared.sums, job, head, warp);
                sync_warps<1, NUM_THREADS>();
                write_result<Query, AT_ONCE, HEAD_SIZE, NUM_THREADS>(p, job, head, shared.sums, 1.0f);
            }
        }
    };

    for (uint32 number = 0;; number++) {
        auto& order = shared.order[number % Shared::ORDERS];
        order.full.wait(number / Shared::ORDERS % 2);
        if (order.is_last) break;
        const int begin = order.piece.begin, end = order.piece.end, seq_len = order.piece.seq_len;
        const int first_head = order.piece.head, num_heads = order.piece.num_heads;

        // ---- the queries, as operands B of [channels][heads] ----
        uint32 query[COLUMNS][STEPS][2];
        float column_scale[COLUMNS][2];  // of the logits of heads 8 * n + 2 * j and the next
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            const int head = 8 * n + g;
#pragma unroll
            for (int step = 0; step < STEPS; step++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // float8 keys come four adjacent channels to a lane, see TokenRows::keys.
                    const int channel = 16 * step + (KeyTile::OPERANDS == 1 ? 2 * j + 8 * half : 4 * j + 2 * half);
                    query[n][step][half] =
                        head < HEADS ? *reinterpret_cast<const uint32*>(&order.query[min(head, HEADS - 1)][channel]) : 0u;
                }
            float shift = 1.0f;
            if constexpr (SHIFTED) {
                float magnitude = 0.0f;
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        magnitude = fmaxf(magnitude, fmaxf(fabsf(to_float(low_half<Query>(query[n][step][half]))),
                                                           fabsf(to_float(high_half<Query>(query[n][step][half])))));
                shift = shift_to_one(lanes_max<4>(magnitude));
#pragma unroll
                for (int step = 0; step < STEPS; step++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        query[n][step][half] = pack<Operand>(to_float(low_half<Query>(query[n][step][half])) * shift,
                                                             to_float(high_half<Query>(query[n][step][half])) * shift);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
                column_scale[n][i] =
                    SHIFTED ? logit_scale / __shfl_sync(ALL_LANES, shift, (2 * j + i) * 4) : logit_scale;
        }

        float max[COLUMNS][2], sum[COLUMNS][2];  // of heads 8 * n + 2 * j and the next
        float weighted[COLUMNS][STEPS][4] = {};
#pragma unroll
        for (int n = 0; n < COLUMNS; n++)
            for (int i = 0; i < 2; i++) max[n][i] = LOWEST, sum[n][i] = 0.0f;

        uint32 tile = order.first_tile + warp;
        for (int first = begin + warp * TILE_TOKENS; first < end;
             first += NUM_WORKERS * TILE_TOKENS, tile += NUM_WORKERS) {
            const int slot = tile % SLOTS;
            Tiles& tiles = shared.tiles[slot];
            shared.full[slot].wait(tile / SLOTS % 2);
            if constexpr (BULK)
                if (first + TILE_TOKENS > end) {
                    tiles.values.clear_from(end - first);
                    fence_before_bulk();
                    __syncwarp();
                }

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
                    const int head = first_head + min(8 * n + 2 * j + i % 2, num_heads - 1);
                    const float logit = Bias::add(p, score[n][i] * column_scale[n][i % 2], head, token, seq_len);
                    score[n][i] = token < end ? logit : LOWEST;
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
            // Most tiles leave every maximum where it is.
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
            __syncwarp();
            if (lane == 0) shared.empty[slot].arrive();
        }

        // ---- join the workers: in pairs here, the pairs where they are written ----
        if (threadIdx.x == 0) {
            shared.jobs_seen = *const_cast<volatile int*>(&shared.jobs_posted);
            __threadfence_block();  // the jobs that were posted before
        }
        if (g == 0)
#pragma unroll
            for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    if (8 * n + 2 * j + i < HEADS) shared.max[warp][8 * n + 2 * j + i] = max[n][i];
        sync_warps<1, NUM_THREADS>();  // also for those who still read what is written here next
        const int jobs = shared.jobs_seen;
        const int pair = warp % (NUM_WORKERS / 2);
        const bool is_first = warp < NUM_WORKERS / 2;
        auto& states = shared.pairs;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (is_first == (half == 1))
#pragma unroll
                for (int n = 0; n < COLUMNS; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        const int head = 8 * n + 2 * j + i;
                        const bool there = head < HEADS;
                        const float other = there ? shared.max[(warp + NUM_WORKERS / 2) % NUM_WORKERS][head] : LOWEST;
                        const float pair_max = fmaxf(max[n][i], other);
                        const float rescale = exp_difference(max[n][i], pair_max);
                        float total = sum[n][i] * rescale;
#pragma unroll
                        for (int step = 4; step < WARP; step *= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
                        if (!there) continue;
                        if (g == 0) {
                            states.max[pair][head] = pair_max;
                            states.sum[pair][head] = half == 0 ? total : states.sum[pair][head] + total;
                        }
#pragma unroll
                        for (int step = 0; step < STEPS; step++)
#pragma unroll
                            for (int k = 0; k < 2; k++) {
                                float& joined = states.weighted[pair][head][ValueTile::channel(step, g + 8 * k)];
                                const float mine = weighted[n][step][i + 2 * k] * rescale;
                                joined = half == 0 ? mine : joined + mine;
                            }
                    }
            sync_warps<1, NUM_THREADS>();
        }

        if (p.tmp_out && begin < end)
            write_partition<Scratch, HEAD_SIZE, NUM_THREADS>(p, order.piece, states, value_scale);
        if (order.piece.num_partitions == 1)
            write_result<Query, HEADS, HEAD_SIZE, NUM_THREADS>(p, order.piece, 0, states, value_scale);
        __syncwarp();
        if (lane == 0) {
            order.stored.arrive();
            order.empty.arrive();
        }
        do_jobs(jobs);
    }
    shared.clerk_done.wait(0);
    do_jobs(*const_cast<volatile int*>(&shared.jobs_posted));
}

}  // namespace cupy_paged
