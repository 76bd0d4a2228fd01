// The pieces that attention is cut into: one partition of one sequence, for some query heads of one KV
// head. They are drawn one by one or, while there are many, in groups. Thread block b begins with draw b;
// from then on whoever is free draws the next one, for not all multiprocessors get the same share of the
// memory's bandwidth.
#pragma once
#include "attention_params.cuh"
#include "schedule.cuh"

namespace cupy_paged {

struct Piece {
    int seq, kv_head, head, num_heads, seq_len, begin, end;
    int node, num_nodes;     // its group is this one of the sequence; alone, it is a group of its own
    bool is_first, is_last;  // of its group
    bool is_grouped;         // as all of the sequence are
    bool fits;               // the sequence is not longer than its table
    int64 counter;           // of the arrivals of these heads' groups
};

// HEADS query heads to a piece, at most. By a whole warp.
template <int HEADS> struct PieceWalk {
    const AttentionParams& p;
    PartitionWalk walk;
    uint32 drawn;  // on the first lane: what `next` will find
    int group_end = 0, partition_size = 0;
    Piece piece;

    __device__ explicit PieceWalk(const AttentionParams& params)
        : p(params),
          walk{params.seq_lens, params.num_seqs, params.partition_size, params.max_seq_len, 1},
          drawn(blockIdx.x) {
        piece.is_last = true;
        // A caller's scratch is to hold every partition. Where groups cannot be enough, it need not be counted how
        // many there are.
        const int for_all = ceil_div(int(gridDim.x), per_partition());
        const int64 most_groups = int64(p.num_seqs) * ceil_div(p.max_partitions, GROUP);
        if (!p.partition_size && p.max_partitions > 1 && most_groups >= for_all) walk.for_all = for_all;
    }

    __device__ int per_partition() const { return p.num_kv_heads * p.tiles_per_group; }

    // Draws, after a group's last piece. `next` awaits the answer, so that this goes ahead by the time of
    // an access. Not earlier: what one thread block has taken no other can help with.
    __device__ void draw() {
        if (threadIdx.x % WARP == 0) drawn = gridDim.x + atomicAdd(&p.work->pieces_taken, 1u);
    }

    __device__ bool next() {
        if (piece.is_last) return begin_group();
        piece.is_first = false;
        end_piece(piece.end);
        return true;
    }

private:
    __device__ bool begin_group() {
        const uint32 number = __shfl_sync(ALL_LANES, drawn, 0);
        if (!walk.seek(number / per_partition())) return false;
        const int part = int(number % per_partition());
        const int head_in_group = part % p.tiles_per_group * HEADS;
        piece.seq = walk.seq;
        piece.kv_head = part / p.tiles_per_group;
        piece.head = piece.kv_head * p.group_size + head_in_group;
        piece.num_heads = min(HEADS, p.group_size - head_in_group);
        piece.seq_len = readable_tokens(walk.seq_len, p.max_seq_len);
        piece.fits = walk.seq_len <= p.max_seq_len;
        piece.counter = int64(walk.seq) * per_partition() + part;

        partition_size = partition_size_of(piece.seq_len, p.partition_size);
        const int tokens = walk.is_grouped ? GROUP * partition_size : partition_size;
        piece.node = int(number / per_partition() - walk.before);
        piece.num_nodes = walk.num_steps;
        piece.is_grouped = walk.is_grouped;
        piece.is_first = true;
        group_end = min((piece.node + 1) * tokens, piece.seq_len);
        end_piece(piece.node * tokens);
        return true;
    }

    __device__ void end_piece(int begin) {
        piece.begin = begin;
        piece.end = min(begin + partition_size, group_end);
        piece.is_last = piece.end == group_end;
    }
};

// By one warp of each thread block, after its last draw and its last arrival. The last of all leaves every
// counter at zero, for the next launch: also those that somebody who changed lengths meanwhile has upset.
__device__ inline void leave(const AttentionParams& p) {
    uint32 gone = 0;
    if (threadIdx.x % WARP == 0)
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                     : "=r"(gone)
                     : "l"(&p.work->blocks_gone)
                     : "memory");
    if (__shfl_sync(ALL_LANES, gone, 0) != gridDim.x - 1) return;
    __syncwarp();
    const int64 count = p.max_partitions > 1 ? int64(p.num_seqs) * p.num_kv_heads * p.tiles_per_group : 0;
    for (int64 i = threadIdx.x % WARP; i < count; i += WARP) p.work->arrivals[i] = 0;
    if (threadIdx.x % WARP == 0) p.work->pieces_taken = p.work->blocks_gone = 0;
}

}  // namespace cupy_paged
