// Tiles of 16 tokens that one warp fetches and another feeds to matrix instructions.
//
// Tiles are made of chunks of 16 bytes. Values of tokens that are not there are zeros, so what their slots
// hold, NaN included, cannot reach a result; their keys may be anything, for their scores are masked.
#pragma once
#include "arch.cuh"
#include "copies.cuh"
#include "dtypes.cuh"
#include "layouts.cuh"
#include "mma.cuh"

namespace cupy_paged {

constexpr int TILE_TOKENS = 16;

struct alignas(16) Chunk {
    uint32 word[4];
};

// Chunks of channels: keys of every layout, values of `Rows`. Not BY_TOKEN: [chunk][token]. BY_TOKEN:
// [token][chunk], arranged so that eight tokens' chunks of the same channels lie in different banks: by
// swapping chunks within a row, or where rows are of another length, by an odd number of chunks a row.
template <class T, int HEAD_SIZE, bool BY_TOKEN> struct TokenRows {
    static constexpr int CHUNK = 16 / sizeof(T);
    static constexpr int CHUNKS = HEAD_SIZE / CHUNK;
    static constexpr bool SWAPPED = BY_TOKEN && CHUNKS % 8 == 0;
    static constexpr int ROW = SWAPPED ? CHUNKS : CHUNKS | 1;
    static constexpr int OPERANDS = sizeof(T) == 1 ? 2 : 1;  // that a pair of chunks makes

    Chunk chunks[TILE_TOKENS * (BY_TOKEN ? ROW : CHUNKS)];

    static __device__ int index(int token, int c) {
        if constexpr (!BY_TOKEN) return c * TILE_TOKENS + token;
        return token * ROW + (SWAPPED ? c ^ token % 8 : c);
    }
    __device__ Chunk* at(int token, int c) { return chunks + index(token, c); }
    __device__ const Chunk* at(int token, int c) const { return chunks + index(token, c); }

    // `token_at(t)` is where token t begins, and is asked by all lanes at a time; `chunk_step(c)` is how far
    // its chunk c is from there. Lanes run along whichever of tokens and chunks is contiguous in the cache.
    template <class At, class Step> __device__ void fetch(At token_at, int live_tokens, Step chunk_step) {
        const int lane = threadIdx.x % WARP;
        const auto copy = [&](const T* token, int t, int c) {
            copy_async_once(at(t, c), token + chunk_step(c), t < live_tokens ? 16 : 0);
        };
        if constexpr (BY_TOKEN && !SWAPPED) {
            // Rows of no round length, one after the other: else most of a warp's accesses would be short.
            static_assert(TILE_TOKENS * CHUNKS % WARP == 0, "a warp must come out even");
#pragma unroll
            for (int first = 0; first < TILE_TOKENS * CHUNKS; first += WARP) {
                const int t = (first + lane) / CHUNKS;
                copy(token_at(t), t, (first + lane) % CHUNKS);
            }
        } else {
            constexpr int ROW_LANES = BY_TOKEN ? 8 : WARP / TILE_TOKENS;
            constexpr int ROWS = WARP / ROW_LANES;  // tokens side by side
            const int column = BY_TOKEN ? lane % ROW_LANES : lane / TILE_TOKENS;
#pragma unroll
            for (int first = 0; first < TILE_TOKENS; first += ROWS) {
                const int t = first + (BY_TOKEN ? lane / ROW_LANES : lane % TILE_TOKENS);
                const T* token = token_at(t);
#pragma unroll
                for (int c = column; c < CHUNKS; c += ROW_LANES) copy(token, t, c);
            }
        }
    }

    // Keys of chunks 2 * pair and 2 * pair + 1 as operands A of [tokens][channels]. `token` is that of
    // row lane % 16.
    __device__ void keys(int pair, int token, uint32 (&a)[OPERANDS][4]) const {
        uint32 m[4];
        load_matrices(m, at(token, 2 * pair + threadIdx.x % WARP / TILE_TOKENS));
        if constexpr (OPERANDS == 1) {
            for (int i = 0; i < 4; i++) a[0][i] = m[i];
        } else {
            // A lane has four adjacent channels, which it takes for columns 2j, 2j + 1, 2j + 8, 2j + 9.
            for (int n = 0; n < 2; n++)
                for (int i = 0; i < 4; i++) a[n][i] = halves<T>(m[2 * n + i % 2] >> (i < 2 ? 0 : 16) & 0xffffu);
        }
    }

    // Values of the same chunks as operands A of [channels][tokens].
    __device__ void values(int pair, uint32 (&a)[OPERANDS][4]) const {
        const int lane = threadIdx.x % WARP;
        uint32 m[4];
        if constexpr (OPERANDS == 1) {
            load_matrices_transposed(m, at(lane % 8 + lane / 16 * 8, 2 * pair + lane / 8 % 2));
            for (int i = 0; i < 4; i++) a[0][i] = m[i];
        } else {
            // Pairs of channels are moved as one: a lane has two channels of two tokens in a word.
            load_matrices_transposed(m, at(lane % 16, 2 * pair + lane / 16));
            for (int n = 0; n < 2; n++)
                for (int i = 0; i < 4; i++)
                    a[n][i] = halves<T>(__byte_perm(m[2 * n + i / 2], 0, i % 2 ? 0x4431 : 0x4420));
        }
    }

    static __device__ int token_of_row(int row) { return row; }

    // The channel of row `row` of the n-th operand of `values`.
    static __device__ int channel(int n, int row) {
        return 16 * n + (OPERANDS == 1 ? row : row % 8 * 2 + row / 8);
    }
};

// Chunks of tokens, [channel][chunk]: values of `Vllm`.
template <class T, int HEAD_SIZE> struct TokenColumns {
    static constexpr int CHUNK = 16 / sizeof(T);
    static constexpr int CHUNKS = TILE_TOKENS / CHUNK;
    static constexpr int OPERANDS = sizeof(T) == 1 ? 2 : 1;  // that one load of matrices makes

    Chunk chunk[HEAD_SIZE][CHUNKS];

    // `token_at(t)` is where token t begins in the first channel, and is asked by all lanes at a time.
    template <int BLOCK_SIZE, class At> __device__ void fetch(const T* cache, At token_at, int live_tokens) {
        constexpr int LANES = WARP / CHUNKS;  // channels side by side
        const int lane = threadIdx.x % WARP;
        const int column = lane % CHUNKS;
        const int live = min(max(live_tokens - column * CHUNK, 0), CHUNK) * int(sizeof(T));
        const T* base = token_at(column * CHUNK);
        const T* group = live > 0 ? base : cache;  // a dead token's may not be where a chunk begins
#pragma unroll
        for (int channel = lane / CHUNKS; channel < HEAD_SIZE; channel += LANES)
            copy_async_once(&chunk[channel][column], group + int64(channel) * BLOCK_SIZE, live);
    }

    // Puts zeros in place of the tokens from `token` on.
    __device__ void clear_from(int token) {
        T* elements = reinterpret_cast<T*>(chunk);
        for (int i = threadIdx.x % WARP; i < HEAD_SIZE * TILE_TOKENS; i += WARP)
            if (i % TILE_TOKENS >= token) elements[i] = {};
    }

    // Values of the pair-th 16 * OPERANDS channels as operands A of [channels][tokens].
    __device__ void values(int pair, uint32 (&a)[OPERANDS][4]) const {
        const int lane = threadIdx.x % WARP;
        uint32 m[4];
        if constexpr (OPERANDS == 1) {
            load_matrices(m, &chunk[16 * pair + lane % 16][lane / 16]);
            for (int i = 0; i < 4; i++) a[0][i] = m[i];
        } else {
            load_matrices(m, &chunk[32 * pair + lane][0]);
            for (int n = 0; n < 2; n++)
                for (int i = 0; i < 4; i++) a[n][i] = halves<T>(m[2 * n + i % 2] >> (i < 2 ? 0 : 16) & 0xffffu);
        }
    }

    // Of float8 a lane has four adjacent tokens, which it takes for columns 2j, 2j + 1, 2j + 8 and
    // 2j + 9: scores must come in that order.
    static __device__ int token_of_row(int row) {
        return OPERANDS == 1 ? row : row % 8 / 2 * 4 + row % 2 + row / 8 * 2;
    }

    static __device__ int channel(int n, int row) { return 16 * n + row; }
};

template <class Layout, class T, int HEAD_SIZE> struct WarpValues;
template <class T, int HEAD_SIZE> struct WarpValues<Rows, T, HEAD_SIZE> {
    using Tile = TokenRows<T, HEAD_SIZE, true>;
};
template <class T, int HEAD_SIZE> struct WarpValues<Vllm, T, HEAD_SIZE> {
    using Tile = TokenColumns<T, HEAD_SIZE>;
};

}  // namespace cupy_paged

