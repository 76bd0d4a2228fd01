// Moves a tile of tokens from one place to another, head by head, whatever the two layouts.
//
// Where a head's token lies is told by a function of (head, token of the tile, channel), an index
// of elements. Both sides keep WIDTH channels of a token together, or one of them keeps the
// tokens of a channel together, as the values of layout "vllm" do; then the tile is turned in
// shared memory. Tokens that are not live are neither read nor written.
#pragma once
#include "accesses.cuh"

namespace cupy_paged {

// What is loaded is stored with the same bits between equal types; float8 codes become their values
// times `scale`.
template <int N, class Target, class Source>
__device__ inline void store_moved(Target* target, const Bytes<N * sizeof(Source)>& bytes, float scale) {
    if constexpr (same_type<Source, Target>) {
        store_bytes<N * sizeof(Source)>(target, bytes);
    } else {
        const auto& in = reinterpret_cast<const Vector<Source, N>&>(bytes);
        Vector<Target, N> out;
#pragma unroll
        for (int i = 0; i < N; i++) out.element[i] = from_float<Target>(to_float(in.element[i]) * scale);
        store_vector(target, out);
    }
}

__device__ __host__ constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

// Heads [first_head, end_head) of TOKENS tokens, WIDTH channels at an access. Neighbouring lanes take
// RUN accesses of a token, then the next token: as many as make both sides read and write whole
// sectors, where the accesses of a token are apart but those of neighbouring tokens are not.
template <int HEAD_SIZE, int TOKENS, int WIDTH, int RUN, int NUM_THREADS, class Source, class Target, class Live,
          class From, class To>
__device__ inline void move_channels(const Source* source, Target* target, float scale, int first_head, int end_head,
                                     const Live& live, const From& from, const To& to) {
    constexpr int ACCESSES = HEAD_SIZE / WIDTH, OF_HEAD = TOKENS * ACCESSES, IN_FLIGHT = 4;
    constexpr int TOGETHER = common_divisor(RUN, ACCESSES);
    const int total = (end_head - first_head) * OF_HEAD;
    for (int begin = threadIdx.x; begin < total; begin += IN_FLIGHT * NUM_THREADS) {
        Bytes<WIDTH * sizeof(Source)> held[IN_FLIGHT];
        int64 index[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            const int i = begin + k * NUM_THREADS;
            const int head = first_head + i / OF_HEAD, access = i % OF_HEAD;
            const int token = access / TOGETHER % TOKENS;
            const int channel = (access / (TOGETHER * TOKENS) * TOGETHER + access % TOGETHER) * WIDTH;
            index[k] = -1;
            if (i >= total || !live(token)) continue;
            held[k] = load_bytes<WIDTH * sizeof(Source)>(source + from(head, token, channel));
            index[k] = to(head, token, channel);
        }
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++)
            if (index[k] >= 0) store_moved<WIDTH, Target, Source>(target + index[k], held[k], scale);
    }
}

// A tile on its way through shared memory: a token's channels in a row. A warp that takes columns has
// WARP / TOKENS of them: with rows as many elements further apart, in words, it meets no bank twice,
// nor much where TOKENS is no power of two.
template <class T, int TOKENS> struct TurnedTile {
    static constexpr int OF_WORD = 4 / int(sizeof(T)), GAP = WARP / TOKENS / OF_WORD * OF_WORD;
    static constexpr int CHANNELS = 64, PITCH = CHANNELS + (GAP ? GAP : OF_WORD);
    alignas(4) T element[TOKENS * PITCH];
};

// From columns to rows: the source keeps TOKEN_WIDTH tokens of a channel together, the target WIDTH
// channels of a token; WIDTH elements fill a word at most.
template <int HEAD_SIZE, int TOKENS, int TOKEN_WIDTH, int WIDTH, int NUM_THREADS, class Source, class Target,
          class Live, class From, class To>
__device__ inline void move_columns_to_rows(const Source* source, Target* target, float scale, int first_head,
                                            int end_head, const Live& live, const From& from, const To& to) {
    using Tile = TurnedTile<Source, TOKENS>;
    __shared__ Tile tile;
    constexpr int OF_CHANNEL = TOKENS / TOKEN_WIDTH, READS = Tile::CHANNELS * OF_CHANNEL;
    constexpr int OF_TOKEN = Tile::CHANNELS / WIDTH, WRITES = TOKENS * OF_TOKEN;
    for (int head = first_head; head < end_head; head++) {
        for (int begin = 0; begin < HEAD_SIZE; begin += Tile::CHANNELS) {
            Vector<Source, TOKEN_WIDTH> held[ceil_div(READS, NUM_THREADS)];
#pragma unroll
            for (int i = threadIdx.x, k = 0; k < ceil_div(READS, NUM_THREADS); i += NUM_THREADS, k++) {
                const int token = i % OF_CHANNEL * TOKEN_WIDTH, channel = begin + i / OF_CHANNEL;
                if (i < READS && channel < HEAD_SIZE && live(token))
                    held[k] = load_vector<TOKEN_WIDTH>(source + from(head, token, channel));
            }
            __syncthreads();  // the tile before this one has been read
#pragma unroll
            for (int i = threadIdx.x, k = 0; k < ceil_div(READS, NUM_THREADS); i += NUM_THREADS, k++) {
                Source* column = tile.element + i % OF_CHANNEL * TOKEN_WIDTH * Tile::PITCH + i / OF_CHANNEL;
#pragma unroll
                for (int j = 0; j < TOKEN_WIDTH; j++)
                    if (i < READS) column[j * Tile::PITCH] = held[k].element[j];
            }
            __syncthreads();
#pragma unroll
            for (int i = threadIdx.x; i < WRITES; i += NUM_THREADS) {
                const int token = i / OF_TOKEN, channel = i % OF_TOKEN * WIDTH;
                if (begin + channel >= HEAD_SIZE || !live(token)) continue;
                const auto row = load_bytes<WIDTH * sizeof(Source)>(tile.element + token * Tile::PITCH + channel);
                store_moved<WIDTH, Target, Source>(target + to(head, token, begin + channel), row, scale);
            }
        }
    }
}

// The way back, of the same bits.
template <int HEAD_SIZE, int TOKENS, int TOKEN_WIDTH, int WIDTH, int NUM_THREADS, class T, class Live, class From,
          class To>
__device__ inline void move_rows_to_columns(const T* source, T* target, int first_head, int end_head, const Live& live,
                                            const From& from, const To& to) {
    using Tile = TurnedTile<T, TOKENS>;
    __shared__ Tile tile;
    constexpr int OF_TOKEN = Tile::CHANNELS / WIDTH, READS = TOKENS * OF_TOKEN;
    constexpr int OF_CHANNEL = TOKENS / TOKEN_WIDTH, WRITES = Tile::CHANNELS * OF_CHANNEL;
    for (int head = first_head; head < end_head; head++) {
        for (int begin = 0; begin < HEAD_SIZE; begin += Tile::CHANNELS) {
            Bytes<WIDTH * sizeof(T)> held[ceil_div(READS, NUM_THREADS)];
#pragma unroll
            for (int i = threadIdx.x, k = 0; k < ceil_div(READS, NUM_THREADS); i += NUM_THREADS, k++) {
                const int token = i / OF_TOKEN, channel = begin + i % OF_TOKEN * WIDTH;
                if (i < READS && channel < HEAD_SIZE && live(token))
                    held[k] = load_bytes<WIDTH * sizeof(T)>(source + from(head, token, channel));
            }
            __syncthreads();  // the tile before this one has been read
#pragma unroll
            for (int i = threadIdx.x, k = 0; k < ceil_div(READS, NUM_THREADS); i += NUM_THREADS, k++)
                if (i < READS)
                    store_bytes<WIDTH * sizeof(T)>(
                        tile.element + i / OF_TOKEN * Tile::PITCH + i % OF_TOKEN * WIDTH, held[k]);
            __syncthreads();
#pragma unroll
            for (int i = threadIdx.x; i < WRITES; i += NUM_THREADS) {
                const int token = i % OF_CHANNEL * TOKEN_WIDTH, channel = begin + i / OF_CHANNEL;
                if (channel >= HEAD_SIZE || !live(token)) continue;
                const T* column = tile.element + token * Tile::PITCH + i / OF_CHANNEL;
                Vector<T, TOKEN_WIDTH> out;
#pragma unroll
                for (int j = 0; j < TOKEN_WIDTH; j++) out.element[j] = column[j * Tile::PITCH];
                store_vector(target + to(head, token, channel), out);
            }
        }
    }
}

}  // namespace cupy_paged
