// The pieces that attention is cut into: one partition of one sequence, for some query heads of one KV
// head. Thread block b begins with piece b; from then on whoever is free takes the next one, for not all
// multiprocessors get the same share of the memory's bandwidth.
#pragma once
#include "attention_params.cuh"
#include "schedule.cuh"

namespace cupy_paged {

struct Piece {
    int seq, partition, num_partitions, kv_head, head, num_heads, seq_len, begin, end;
    bool fits;      // the sequence is not longer than its table
    int64 counter;  // of the arrivals of these heads' partitions
};

// HEADS query heads to a piece, at most. By a whole warp.
template <int HEADS> struct PieceWalk {
    const AttentionParams& p;
    PartitionWalk walk;
    uint32 drawn;  // on the first lane: the piece that `next` will find
    Piece piece;

    __device__ explicit PieceWalk(const AttentionParams& params)
        : p(params),
          walk{params.seq_lens, params.num_seqs, params.partition_size, params.max_seq_len, 1},
          drawn(blockIdx.x) {}

    // Takes another piece. `next` awaits the answer, so that this goes ahead by the time of an access. Not
    // earlier: what one thread block has taken no other can help with.
    __device__ void draw() {
        if (threadIdx.x % WARP == 0) drawn = gridDim.x + atomicAdd(&p.work->pieces_taken, 1u);
    }

    __device__ bool next() {
        const int group_size = p.num_heads / p.num_kv_heads;
        const int tiles_per_group = ceil_div(group_size, HEADS);
        const int pieces_per_partition = p.num_kv_heads * tiles_per_group;
        const uint32 number = __shfl_sync(ALL_LANES, drawn, 0);
        if (!walk.seek(number / pieces_per_partition)) return false;
        const int part = int(number % pieces_per_partition);
        const int head_in_group = part % tiles_per_group * HEADS;
        piece.seq = walk.seq;
        piece.partition = int(number / pieces_per_partition - walk.before);
        piece.kv_head = part / tiles_per_group;
        piece.head = piece.kv_head * group_size + head_in_group;
        piece.num_heads = min(HEADS, group_size - head_in_group);
        piece.seq_len = readable_tokens(walk.seq_len, p.max_seq_len);
        piece.fits = walk.seq_len <= p.max_seq_len;
        const int partition_size = partition_size_of(piece.seq_len, p.partition_size);
        piece.num_partitions = max(ceil_div(piece.seq_len, partition_size), 1);
        piece.begin = piece.partition * partition_size;
        piece.end = min(piece.begin + partition_size, piece.seq_len);
        piece.counter = int64(walk.seq) * pieces_per_partition + part;
        return true;
    }
};

// By one warp of each thread block, after its last draw and its last arrival. The last of all leaves every
// counter at zero, for the next launch: also those that somebody who changed lengths meanwhile has upset.
template <int HEADS> __device__ inline void leave(const AttentionParams& p) {
    uint32 gone = 0;
    if (threadIdx.x % WARP == 0)
        asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                     : "=r"(gone)
                     : "l"(&p.work->blocks_gone)
                     : "memory");
    if (__shfl_sync(ALL_LANES, gone, 0) != gridDim.x - 1) return;
    __syncwarp();
    const int64 count = int64(p.num_seqs) * p.num_kv_heads * ceil_div(p.num_heads / p.num_kv_heads, HEADS);
    for (int64 i = threadIdx.x % WARP; i < count; i += WARP) p.work->arrivals[i] = 0;
    if (threadIdx.x % WARP == 0) p.work->pieces_taken = p.work->blocks_gone = 0;
}

}  // namespace cupy_paged
