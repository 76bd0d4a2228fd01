// Decode attention over a paged KV cache.
//
//   out[s, h] = sum_t softmax_t(scale * query[s, h] . key[t] + bias(h, t)) value[t],   t < seq_lens[s]
//
// where token t of sequence s lies in cache block block_tables[s, t / block_size]. After Kwon et al.,
// Efficient Memory Management for Large Language Model Serving with PagedAttention, arXiv:2309.06180.
//
// A sequence is cut into partitions of a fixed number of tokens. A thread block takes one partition
// of one KV head at a time and serves all query heads of that head's group, so keys and values are
// read once. It leaves (max, sum, normalised output) of the partition, which combine_partitions.cu
// joins, or, where no sequence can have a second partition, writes the result itself.
//
// The order of every sum follows from the place of a token in its own sequence. Neither the batch nor
// the number of thread blocks has a say, so a sequence gives the same bits in any company.
//
// All arithmetic is float32 on CUDA cores.
#include "attention_params.cuh"
#include "dtypes.cuh"
#include "layouts.cuh"
#include "masks.cuh"
#include "reduce.cuh"
#include "schedule.cuh"
#include "sinks.cuh"
#include "softmax.cuh"
#include "tiles.cuh"

namespace cupy_paged {

constexpr int MAX_HEADS = 8;  // query heads whose sums one thread keeps

// ---- one thread block's shared memory ----

template <class KeyTile, class ValueTile, class Blocks, int STAGES, int GROUP, int HEAD_SIZE, int TILE,
          int TOKEN_SLOTS>
struct Shared {
    struct Stage {
        alignas(16) KeyTile keys;
        alignas(16) ValueTile values;
    };
    union {
        Stage stage[STAGES];
        float partial[TOKEN_SLOTS][GROUP][HEAD_SIZE];  // once all stages are consumed
    };
    alignas(16) float query[GROUP][HEAD_SIZE];
    alignas(16) float weight[GROUP][TILE];  // logits first, then exp(logit - max)
    float max[GROUP], sum[GROUP];           // softmax state so far, see softmax.cuh
    float rescale[GROUP];                   // what the last tile's new maximum makes of older sums
    Blocks blocks[2];
};

// Thread blocks to fit an SM side by side: three leave a thread 168 registers, which are too few for
// the sums of more than four heads.
__host__ __device__ constexpr int blocks_per_sm(int group) {
    return ceil_div(group, ceil_div(group, MAX_HEADS)) > 4 ? 2 : 3;
}

// Grid: any number of thread blocks; each takes every gridDim.x-th (partition, KV head) pair.
//
// GROUP query heads share a tile; a KV head whose group is larger than GROUP is served by several
// thread blocks. SHARED_BYTES is the planner's figure for the shared memory.
template <class Query, class Cache, class Layout, int HEAD_SIZE, int BLOCK_SIZE, int GROUP, int TILE, int STAGES,
          int NUM_THREADS, int KEY_COPY_BYTES, int VALUE_COPY_BYTES, int SHARED_BYTES, class Mask, class Bias,
          class Sink>
__global__ void __launch_bounds__(NUM_THREADS, blocks_per_sm(GROUP)) paged_attention(const AttentionParams p) {
    using KeyTile = cupy_paged::KeyTile<Cache, Layout, HEAD_SIZE, BLOCK_SIZE, TILE, KEY_COPY_BYTES>;
    using ValueTile =
        typename ValueTileOf<Layout>::template Tile<Cache, HEAD_SIZE, BLOCK_SIZE, TILE, VALUE_COPY_BYTES>;
    using Blocks = TileBlocks<TILE, BLOCK_SIZE>;

    constexpr int NUM_WARPS = NUM_THREADS / WARP;
    constexpr int CHUNK = KeyTile::CHUNK;
    constexpr int CHANNELS = ValueTile::CHANNELS, TOKENS = ValueTile::TOKENS;
    // Threads over [token slots][head slots][channel groups] when weighing values.
    constexpr int SLOTS = NUM_THREADS / ValueTile::CHANNEL_GROUPS;
    constexpr int HEAD_SLOTS = ceil_div(GROUP, MAX_HEADS);
    constexpr int HEADS = ceil_div(GROUP, HEAD_SLOTS);  // query heads of one thread
    constexpr int TOKEN_SLOTS = min_of(SLOTS / HEAD_SLOTS, TILE / TOKENS);
    constexpr int LANES_PER_TOKEN = 4;  // when scoring keys
    static_assert(TOKEN_SLOTS >= 1, "too many heads or channels for this many threads");
    static_assert(TILE % 8 == 0 && TILE <= WARP && NUM_THREADS % WARP == 0, "tile must fit a warp");

    using Shared = cupy_paged::Shared<KeyTile, ValueTile, Blocks, STAGES, GROUP, HEAD_SIZE, TILE, TOKEN_SLOTS>;
    static_assert(sizeof(Shared) <= SHARED_BYTES, "planner and kernel disagree on shared memory");
    extern __shared__ __align__(16) uint8 shared_memory[];
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int work_per_partition = p.num_kv_heads * p.tiles_per_group;
    const float logit_scale = p.scale * (p.k_scale_array ? *p.k_scale_array : p.k_scale);
    const float value_scale = p.v_scale_array ? *p.v_scale_array : p.v_scale;

    PartitionWalk walk{p.seq_lens, p.num_seqs, p.partition_size, p.max_seq_len, Sink::MIN_PARTITIONS};

    for (int64 work = blockIdx.x; walk.seek(work / work_per_partition); work += gridDim.x) {
        // ---- which tokens and heads are mine ----
        const int seq = walk.seq;
        const int partition = int(work / work_per_partition - walk.before);
        const int kv_head = int(work % work_per_partition) / p.tiles_per_group;
        const int head_in_group = int(work % work_per_partition) % p.tiles_per_group * GROUP;
        const int head = kv_head * p.group_size + head_in_group;
        const int num_heads = min(GROUP, p.group_size - head_in_group);
        const int seq_len = readable_tokens(walk.seq_len, p.max_seq_len);
        const int partition_size = partition_size_of(seq_len, p.partition_size);
        const int begin = partition * partition_size;
        const int end = min(begin + partition_size, seq_len);
        const int num_tiles = ceil_div(end - begin, TILE);
        const Mask mask(p, seq_len);

        // ---- fetch ----
        const auto look_up_block = [&](int tile) {
            const int block = (begin + tile * TILE) / BLOCK_SIZE + int(threadIdx.x);
            const bool live = threadIdx.x < Blocks::COUNT && tile < num_tiles && block * int64(BLOCK_SIZE) < end;
            return live ? p.block_tables[seq * p.block_tables_stride + block] : 0;
        };
        const auto keep_block = [&](int tile, int id) {
            if (threadIdx.x < Blocks::COUNT) shared.blocks[tile % 2].id[threadIdx.x] = id;
        };
        const auto fetch = [&](int tile) {
            auto& stage = shared.stage[tile % STAGES];
            TileSource<Mask> from{p.key_strides, mask, kv_head, head, num_heads, begin + tile * TILE, end};
            stage.keys.template fetch<Mask, NUM_THREADS>(static_cast<const Cache*>(p.key_cache), from,
                                                         shared.blocks[tile % 2]);
            from.stride = p.value_strides;
            stage.values.template fetch<Mask, NUM_THREADS>(static_cast<const Cache*>(p.value_cache), from,
                                                           shared.blocks[tile % 2]);
        };

        for (int i = threadIdx.x; i < GROUP * HEAD_SIZE; i += NUM_THREADS) {
            const int h = i / HEAD_SIZE, channel = i % HEAD_SIZE;
            const int64 at = seq * p.query_stride_seq + (head + h) * p.query_stride_head + channel;
            shared.query[h][channel] = h < num_heads ? to_float(static_cast<const Query*>(p.query)[at]) : 0.0f;
        }
        for (int h = threadIdx.x; h < GROUP; h += NUM_THREADS) {
            shared.max[h] = LOWEST;
            shared.sum[h] = 0.0f;
        }
        keep_block(0, look_up_block(0));
        keep_block(1, look_up_block(1));
        __syncthreads();
        if (num_tiles > 0) fetch(0);

        const int channel_group = threadIdx.x % ValueTile::CHANNEL_GROUPS;
        const int head_slot = threadIdx.x / ValueTile::CHANNEL_GROUPS % HEAD_SLOTS;
        const int token_slot = threadIdx.x / ValueTile::CHANNEL_GROUPS / HEAD_SLOTS;
        float weighted[HEADS][CHANNELS] = {};

        for (int tile = 0; tile < num_tiles; tile++) {
            wait_for_copies();
            __syncthreads();
            if (STAGES > 1 && tile + 1 < num_tiles) fetch(tile + 1);
            const int block_after_next = look_up_block(tile + 2);
            const auto& stage = shared.stage[tile % STAGES];

            // ---- score and mask ----
            const int part = threadIdx.x % LANES_PER_TOKEN;
#pragma unroll 1
            for (int t = threadIdx.x / LANES_PER_TOKEN; t < TILE; t += NUM_THREADS / LANES_PER_TOKEN) {
                const int token = begin + tile * TILE + t;
#pragma unroll 1
                for (int first = 0; first < GROUP; first += HEADS) {
                    float dot[HEADS] = {};
#pragma unroll 2
                    for (int c = part; c < KeyTile::NUM_CHUNKS; c += LANES_PER_TOKEN) {
                        float key[CHUNK];
                        to_floats(stage.keys.chunk[c][t], key);
#pragma unroll
                        for (int h = 0; h < HEADS; h++) {
                            float query[CHUNK];
                            read_floats(&shared.query[min(first + h, GROUP - 1)][c * CHUNK], query);
#pragma unroll
                            for (int i = 0; i < CHUNK; i++) dot[h] += query[i] * key[i];
                        }
                    }
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        const float logit = lanes_sum<LANES_PER_TOKEN>(dot[h]) * logit_scale;
                        if (h % LANES_PER_TOKEN != part || first + h >= num_heads) continue;
                        const int my_head = head + first + h;
                        const bool live = token < end && mask.attends(my_head, token - token % BLOCK_SIZE);
                        shared.weight[first + h][t] = live ? Bias::add(p, logit, my_head, token, seq_len) : LOWEST;
                    }
                }
            }
            __syncthreads();
            keep_block(tile, block_after_next);

            // ---- fold into the softmax state ----
            for (int h = warp; h < num_heads; h += NUM_WARPS) {
                const float logit = lane < TILE ? shared.weight[h][lane] : LOWEST;
                const float old_max = shared.max[h];
                const float new_max = fmaxf(old_max, lanes_max(logit));
                const float weight = logit == LOWEST ? 0.0f : exp_difference(logit, new_max);
                const float rescale = exp_difference(old_max, new_max);
                const float sum = lanes_sum(weight);
                if (lane < TILE) shared.weight[h][lane] = weight;
                __syncwarp();
                if (lane == 0) {
                    shared.max[h] = new_max;
                    shared.sum[h] = shared.sum[h] * rescale + sum;
                    shared.rescale[h] = rescale;
                }
            }
            __syncthreads();

            if (token_slot < TOKEN_SLOTS) {
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float rescale = shared.rescale[min(head_slot * HEADS + h, num_heads - 1)];
#pragma unroll
                    for (int i = 0; i < CHANNELS; i++) weighted[h][i] *= rescale;
                }
#pragma unroll 1
                for (int t = token_slot * TOKENS; t < TILE; t += TOKEN_SLOTS * TOKENS) {
                    float value[TOKENS][CHANNELS];
                    stage.values.read(channel_group, t, value);
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        float weight[TOKENS];
                        read_floats(&shared.weight[min(head_slot * HEADS + h, num_heads - 1)][t], weight);
#pragma unroll
                        for (int j = 0; j < TOKENS; j++) {
                            // A token that another head of the group asked for may hold NaN for this one.
                            if (Mask::BY_HEAD && weight[j] == 0.0f) continue;
#pragma unroll
                            for (int i = 0; i < CHANNELS; i++) weighted[h][i] += weight[j] * value[j][i];
                        }
                    }
                }
            }
            if (STAGES == 1 && tile + 1 < num_tiles) {
                __syncthreads();
                fetch(tile + 1);
            }
        }
        __syncthreads();

        // ---- write ----
        if (token_slot < TOKEN_SLOTS)
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                if (head_slot * HEADS + h < num_heads)
#pragma unroll
                    for (int i = 0; i < CHANNELS; i++)
                        shared.partial[token_slot][head_slot * HEADS + h][ValueTile::channel(channel_group, i)] =
                            weighted[h][i];
        __syncthreads();
        for (int i = threadIdx.x; i < num_heads * HEAD_SIZE; i += NUM_THREADS) {
            const int h = i / HEAD_SIZE, channel = i % HEAD_SIZE;
            float total = 0.0f;
            for (int slot = 0; slot < TOKEN_SLOTS; slot++) total += shared.partial[slot][h][channel];
            const float mean = shared.sum[h] == 0.0f ? 0.0f : total / shared.sum[h] * value_scale;
            Sink::template write<HEAD_SIZE>(p, seq, head + h, partition, channel, mean);
        }
        for (int h = threadIdx.x; h < num_heads; h += NUM_THREADS)
            Sink::write_state(p, seq, head + h, partition, shared.max[h], shared.sum[h], end - begin);
        __syncthreads();
    }
}

}  // namespace cupy_paged
