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

    // After `next` was false, and with it what was drawn last has been counted. The last thread block
    // leaves the counters at zero, for the next launch.
    __device__ void leave() {
        if (threadIdx.x % WARP) return;
        if (atomicAdd(&p.work->blocks_gone, 1u) == gridDim.x - 1) {
            p.work->pieces_taken = 0;
            p.work->blocks_gone = 0;
        }
    }
};

}  // namespace cupy_paged
