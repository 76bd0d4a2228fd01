// Tiles of keys and values in shared memory: their shape, how they are fetched, how they are read.
//
// A tile holds TILE consecutive tokens of one KV head. Tokens that nobody attends to are fetched as
// zeros, so what their slots hold, NaN included, cannot reach a result.
#pragma once
#include "arch.cuh"
#include "copies.cuh"
#include "dtypes.cuh"
#include "layouts.cuh"

namespace cupy_paged {

// The cache blocks that a tile touches, looked up once a tile.
template <int TILE, int BLOCK_SIZE> struct TileBlocks {
    static constexpr int COUNT = (TILE + BLOCK_SIZE - 2) / BLOCK_SIZE + 1;
    int id[COUNT];

    __device__ int64 of(int token, int first_token) const {
        return id[token / BLOCK_SIZE - first_token / BLOCK_SIZE];
    }
};

// What a fetch needs to know besides its tile.
template <class Mask> struct TileSource {
    CacheStrides stride;
    const Mask& mask;
    int kv_head;
    int head, num_heads;  // the query heads that will read the tile
    int first_token, end; // tokens from `end` on are dead
};

// How many of the `count` tokens from `token` on, all of one cache block, are to be fetched.
template <int BLOCK_SIZE, class Mask>
__device__ inline int live_tokens(const TileSource<Mask>& from, int token, int count) {
    const int live = min(count, from.end - token);
    return live > 0 && from.mask.any_attends(from.head, from.num_heads, token - token % BLOCK_SIZE) ? live : 0;
}

// Keys as [chunk][token][16 bytes of channels], so that lanes that read one chunk of consecutive
// tokens read consecutive shared memory. Four lanes share a token; a padding of two entries keeps
// their four chunks in different banks.
template <class T, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int TILE, int COPY_BYTES> struct KeyTile {
    static constexpr int CHUNK = HEAD_SIZE * sizeof(T) % 16 == 0 ? 16 / sizeof(T) : 8 / sizeof(T);
    static constexpr int NUM_CHUNKS = HEAD_SIZE / CHUNK;
    static constexpr int ROW = TILE + 2;

    Vector<T, CHUNK> chunk[NUM_CHUNKS][ROW];

    template <class Mask, int NUM_THREADS>
    __device__ void fetch(const T* cache, const TileSource<Mask>& from, const TileBlocks<TILE, BLOCK_SIZE>& blocks) {
        constexpr int UNIT = min_of(COPY_BYTES / sizeof(T), CHUNK);
        constexpr int UNITS = HEAD_SIZE / UNIT;
        static_assert(UNIT >= 1 && HEAD_SIZE % UNIT == 0, "key copies must tile a row");
        for (int i = threadIdx.x; i < TILE * UNITS; i += NUM_THREADS) {
            const int t = Layout::KEYS_BY_TOKEN ? i / UNITS : i % TILE;
            const int channel = (Layout::KEYS_BY_TOKEN ? i % UNITS : i / TILE) * UNIT;
            const int token = from.first_token + t;
            const int live = live_tokens<BLOCK_SIZE>(from, token, 1);
            const T* source = cache;
            if (live)
                source += Layout::template key<T, HEAD_SIZE, BLOCK_SIZE>(
                    from.stride, blocks.of(token, from.first_token), from.kv_head, token % BLOCK_SIZE, channel);
            copy_async<UNIT * sizeof(T)>(&chunk[channel / CHUNK][t].element[channel % CHUNK], source,
                                         live * UNIT * int(sizeof(T)));
        }
    }
};

// Values as [token][channel]: a thread owns CHANNELS adjacent channels and reads them token by token.
template <class T, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int TILE, int COPY_BYTES> struct ValuesByToken {
    static constexpr int CHANNELS = min_of(16 / sizeof(T), 8);  // channels of one thread
    static constexpr int TOKENS = 1;                            // tokens a thread takes at a time
    static constexpr int CHANNEL_GROUPS = HEAD_SIZE / CHANNELS;

    T row[TILE][HEAD_SIZE];

    // The channel that is number `i` of the thread with group `group`.
    static __device__ int channel(int group, int i) { return group * CHANNELS + i; }

    template <class Mask, int NUM_THREADS>
    __device__ void fetch(const T* cache, const TileSource<Mask>& from, const TileBlocks<TILE, BLOCK_SIZE>& blocks) {
        constexpr int UNIT = COPY_BYTES / sizeof(T);
        constexpr int UNITS = HEAD_SIZE / UNIT;
        static_assert(UNIT >= 1 && HEAD_SIZE % UNIT == 0, "value copies must tile a row");
        for (int i = threadIdx.x; i < TILE * UNITS; i += NUM_THREADS) {
            const int t = i / UNITS, channel = i % UNITS * UNIT, token = from.first_token + t;
            const int live = live_tokens<BLOCK_SIZE>(from, token, 1);
            const T* source = cache;
            if (live)
                source += Layout::template value<T, HEAD_SIZE, BLOCK_SIZE>(
                    from.stride, blocks.of(token, from.first_token), from.kv_head, token % BLOCK_SIZE, channel);
            copy_async<UNIT * sizeof(T)>(&row[t][channel], source, live * UNIT * int(sizeof(T)));
        }
    }

    // values[token][i] for TOKENS tokens from `t` on.
    __device__ void read(int group, int t, float (&values)[TOKENS][CHANNELS]) const {
        to_floats(load_vector<CHANNELS>(&row[t][channel(group, 0)]), values[0]);
    }
};

// Values as [channel][token]: a thread owns CHANNELS channels, CHANNEL_GROUPS apart, and reads
// several tokens of each at once. Rows are padded by 16 bytes against bank conflicts.
template <class T, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int TILE, int COPY_BYTES> struct ValuesByChannel {
    static constexpr int CHANNELS = 4;
    static constexpr int TOKENS = min_of(16 / sizeof(T), 8);
    static constexpr int CHANNEL_GROUPS = HEAD_SIZE / CHANNELS;
    static constexpr int ROW = TILE + 16 / sizeof(T);

    alignas(16) T row[HEAD_SIZE][ROW];

    static __device__ int channel(int group, int i) { return group + i * CHANNEL_GROUPS; }

    template <class Mask, int NUM_THREADS>
    __device__ void fetch(const T* cache, const TileSource<Mask>& from, const TileBlocks<TILE, BLOCK_SIZE>& blocks) {
        constexpr int UNIT = COPY_BYTES / sizeof(T);  // tokens of one channel
        constexpr int UNITS = TILE / UNIT;
        static_assert(UNIT >= 1 && TILE % UNIT == 0 && BLOCK_SIZE % UNIT == 0, "value copies must tile a block");
        // Units of one cache block side by side, then its channels, then the next block: the order in memory.
        constexpr int RUN = BLOCK_SIZE >= TILE ? UNITS : TILE % BLOCK_SIZE == 0 ? BLOCK_SIZE / UNIT : 1;
        for (int i = threadIdx.x; i < HEAD_SIZE * UNITS; i += NUM_THREADS) {
            const int channel = i / RUN % HEAD_SIZE;
            const int t = (i / (RUN * HEAD_SIZE) * RUN + i % RUN) * UNIT;
            const int token = from.first_token + t;
            const int live = live_tokens<BLOCK_SIZE>(from, token, UNIT);
            const T* source = cache;
            if (live)
                source += Layout::template value<T, HEAD_SIZE, BLOCK_SIZE>(
                    from.stride, blocks.of(token, from.first_token), from.kv_head, token % BLOCK_SIZE, channel);
            copy_async<UNIT * sizeof(T)>(&row[channel][t], source, live * int(sizeof(T)));
        }
    }

    __device__ void read(int group, int t, float (&values)[TOKENS][CHANNELS]) const {
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) {
            float tokens[TOKENS];
            to_floats(load_vector<TOKENS>(&row[channel(group, i)][t]), tokens);
#pragma unroll
            for (int j = 0; j < TOKENS; j++) values[j][i] = tokens[j];
        }
    }
};

template <class Layout> struct ValueTileOf;
template <> struct ValueTileOf<Rows> {
    template <class T, int HEAD_SIZE, int BLOCK_SIZE, int TILE, int COPY_BYTES>
    using Tile = ValuesByToken<T, Rows, HEAD_SIZE, BLOCK_SIZE, TILE, COPY_BYTES>;
};
template <> struct ValueTileOf<Vllm> {
    template <class T, int HEAD_SIZE, int BLOCK_SIZE, int TILE, int COPY_BYTES>
    using Tile = ValuesByChannel<T, Vllm, HEAD_SIZE, BLOCK_SIZE, TILE, COPY_BYTES>;
};

}  // namespace cupy_paged
