// What the attention kernels are told at run time. cupy_paged/attention_gpu.py packs the same
// fields in the same order. Strides count elements; a batch is described by [num_seqs] rows.
#pragma once
#include "arch.cuh"
#include "layouts.cuh"

namespace cupy_paged {

// Counters of one launch at a time, all zero before it and after it.
struct Work {
    uint32 pieces_taken, blocks_gone;  // see pieces.cuh
    uint32 arrivals[1];                // of nodes: [num_seqs, num_kv_heads, tiles_per_group]
};

struct AttentionParams {
    void* out;                  // [num_seqs, num_heads, head_size], query dtype
    float* lse;                 // [num_seqs, num_heads], natural log; may be null
    void* tmp_out;              // [num_seqs, num_heads, max_partitions, head_size], normalised partials;
                                // null, as the next two, where every sequence is one partition
    float* exp_sums;            // [num_seqs, num_heads, max_partitions]
    float* max_logits;          // [num_seqs, num_heads, max_partitions], natural units
    const void* query;          // [num_seqs, num_heads, head_size]
    const void* key_cache;      // see layouts.cuh
    const void* value_cache;
    const int* block_tables;    // [num_seqs, max_num_blocks_per_seq]
    const int* seq_lens;        // [num_seqs]
    const float* alibi_slopes;  // [num_heads]; null without ALiBi
    const float* k_scale_array; // [1]; null where k_scale holds the value
    const float* v_scale_array; // [1]; null where v_scale holds the value
    Work* work;

    int64 query_stride_seq, query_stride_head;
    int64 out_stride_seq, out_stride_head;
    CacheStrides key_strides, value_strides;
    int64 block_tables_stride;

    int num_seqs, num_heads, num_kv_heads;
    int group_size;             // query heads of a KV head
    int tiles_per_group;        // parts that they are divided into, each of other thread blocks
    int partition_size;         // 0: by the length of each sequence, see schedule.cuh
    int max_partitions;
    int max_seq_len;            // what block tables and partitions can hold

    float scale, k_scale, v_scale;

    // Block-sparse attention, see masks.cuh
    int sparse_local_blocks, sparse_vert_stride, sparse_block_size, sparse_head_sliding_step, tp_rank;
};

}  // namespace cupy_paged
