// The role that finds work and fetches it, see paged_attention_mma.cu.
#pragma once
#include "attention_params.cuh"
#include "barriers.cuh"
#include "copies.cuh"
#include "pieces.cuh"
#include "warp_tiles.cuh"

namespace cupy_paged {

template <class T> __device__ inline const T* from_lane(const T* pointer, int lane) {
    return reinterpret_cast<const T*>(
        __shfl_sync(ALL_LANES, reinterpret_cast<unsigned long long>(pointer), lane));
}

// `more`: `walk` has found a piece, and is at the first one.
template <class Query, class Cache, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int HEADS, int SLOTS, bool BULK,
          int QUERY_COPY_BYTES, class Tiles, class Shared>
__device__ inline void fetch_pieces(const AttentionParams& p, PieceWalk<HEADS>& walk, bool more, Shared& shared) {
    // Of the block table the warp keeps what a window of tokens takes, IDS block ids a lane: one more block
    // than has room in the window, which may begin and end within a block.
    constexpr int WINDOW = 256;
    constexpr int IDS = ceil_div(WINDOW / BLOCK_SIZE + 2, WARP);
    // Tiles that the bulk copy engine is given at a time: half the ring at most, so that some are on their way
    // while a batch waits.
    constexpr int BATCH = min_of(4, SLOTS / 2);
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

    const auto look_up_next = [&] {
        const bool there = walk.next();
        if (there) look_up(walk.piece, walk.piece.begin);
        return there;
    };
    if (more) look_up(walk.piece, walk.piece.begin);

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
            else if (piece.is_last) walk.draw();
            const auto key_at = [&](int block, int offset) {
                return Layout::template key<Cache, HEAD_SIZE, BLOCK_SIZE>(p.key_strides, block, piece.kv_head, offset, 0);
            };
            const auto value_at = [&](int block, int offset) {
                return Layout::template value<Cache, HEAD_SIZE, BLOCK_SIZE>(p.value_strides, block, piece.kv_head, offset,
                                                                            0);
            };
            if constexpr (BULK) {
                // A tile is a block: these are the lane's own.
                const Cache* my_keys = key_cache + key_at(id[0], 0);
                const Cache* my_values = value_cache + value_at(id[0], 0);
                // Lanes wait for the slots of a batch side by side, then one of them issues the copies.
                bool looked = false;
                for (int token = window; token < end; token += BATCH * TILE_TOKENS) {
                    if (!looked && token + BATCH * TILE_TOKENS > halfway) {
                        more = look_up_next();
                        looked = true;
                    }
                    const int first = (token - window) / TILE_TOKENS;
                    const int count = min(ceil_div(end - token, TILE_TOKENS), BATCH);
                    if (lane < count) {
                        const uint32 mine = tile + lane;
                        shared.empty[mine % SLOTS].wait(mine / SLOTS % 2 ^ 1);
                        shared.full[mine % SLOTS].arrive_expecting(sizeof(Tiles));
                    }
                    __syncwarp();
                    if constexpr (EVERY_LANE)  // whichever copies has waited
                        for (uint32 i = tile; i < tile + count; i++) shared.empty[i % SLOTS].wait(i / SLOTS % 2 ^ 1);
#pragma unroll
                    for (int i = 0; i < BATCH; i++) {
                        const Cache* keys = from_lane(my_keys, first + i);
                        const Cache* values = from_lane(my_values, first + i);
                        if (i >= count) break;
                        Tiles& tiles = shared.tiles[(tile + i) % SLOTS];
                        Barrier& full = shared.full[(tile + i) % SLOTS];
                        if (elect_lane()) {
                            copy_bulk(&tiles.keys, keys, sizeof(tiles.keys), full);
                            copy_bulk(&tiles.values, values, sizeof(tiles.values), full);
                        }
                    }
                    tile += count;
                }
            } else {
                const int64 key_step = key_at(0, 1) - key_at(0, 0), value_step = value_at(0, 1) - value_at(0, 0);
                for (int token = window; token < end; token += TILE_TOKENS, tile++) {
                    if (token == halfway) more = look_up_next();
                    const int slot = tile % SLOTS;
                    Tiles& tiles = shared.tiles[slot];
                    const int live = piece.end - token;
                    // Within one block all tokens follow from the first; else each lane knows where its own is.
                    constexpr bool IN_ONE_BLOCK = BLOCK_SIZE % TILE_TOKENS == 0;
                    const int mine = IN_ONE_BLOCK ? token : min(token + lane % TILE_TOKENS, piece.end - 1);
                    const int position = mine / BLOCK_SIZE - window / BLOCK_SIZE, offset = mine % BLOCK_SIZE;
                    int block = 0;
#pragma unroll
                    for (int i = 0; i < IDS; i++) {
                        const int found = __shfl_sync(ALL_LANES, id[i], position % WARP);
                        if (position / WARP == i) block = found;
                    }
                    const int64 key_base = key_at(block, offset), value_base = value_at(block, offset);
                    const auto key_of = [&](int t) {
                        return key_cache + (IN_ONE_BLOCK ? key_base + t * key_step : __shfl_sync(ALL_LANES, key_base, t % WARP));
                    };
                    const auto value_of = [&](int t) {
                        return value_cache +
                               (IN_ONE_BLOCK ? value_base + t * value_step : __shfl_sync(ALL_LANES, value_base, t % WARP));
                    };
                    shared.empty[slot].wait(tile / SLOTS % 2 ^ 1);
                    tiles.keys.fetch(key_of, live, [](int c) {
                        return Layout::template key<Cache, HEAD_SIZE, BLOCK_SIZE>({}, 0, 0, 0, c * CHUNK);
                    });
                    if constexpr (Layout::VALUES_BY_TOKEN)
                        tiles.values.fetch(value_of, live, [](int c) { return c * CHUNK; });
                    else
                        tiles.values.template fetch<BLOCK_SIZE>(value_cache, value_of, live);
                    shared.full[slot].arrive_after_copies();
                }
            }
        }
        if (piece.begin >= piece.end) {
            walk.draw();
            more = look_up_next();
        }
    }
    wait_for_copies();
}

}  // namespace cupy_paged
