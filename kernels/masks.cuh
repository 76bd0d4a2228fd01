// Which tokens a query head attends to, and what is added to their logits.
//
// The query is the newest token of its sequence, so "not later than the query" is `token < seq_len`,
// and that test is made by the kernel for every mask.
#pragma once
#include "arch.cuh"
#include "attention_params.cuh"

namespace cupy_paged {

struct Dense {
    static constexpr bool BY_HEAD = false;  // heads of a group may attend to different tokens

    __device__ Dense(const AttentionParams&, int /*seq_len*/) {}
    __device__ bool attends(int /*head*/, int /*page_token*/) const { return true; }
    __device__ bool any_attends(int /*head*/, int /*num_heads*/, int /*page_token*/) const { return true; }
};

// vLLM's block-sparse rule; cupy_paged/masks.py says it in words. A cache block is judged as a
// whole, by its first token, which callers pass as `page_token`.
struct BlockSparse {
    static constexpr bool BY_HEAD = true;

    const AttentionParams& params;
    int newest_block;

    __device__ BlockSparse(const AttentionParams& p, int seq_len)
        : params(p), newest_block((seq_len - 1) / p.sparse_block_size) {}

    __device__ int offset(int head) const {
        const int step = params.sparse_head_sliding_step;
        if (step >= 0) return (params.tp_rank * params.num_heads + head) * step + 1;
        const int kv_head = head / (params.num_heads / params.num_kv_heads);
        return (params.tp_rank * params.num_kv_heads + kv_head) * -step + 1;
    }

    __device__ bool attends(int head, int page_token) const {
        const int block = page_token / params.sparse_block_size;
        return block > newest_block - params.sparse_local_blocks ||
               (block + offset(head)) % params.sparse_vert_stride == 0;
    }

    __device__ bool any_attends(int head, int num_heads, int page_token) const {
        for (int h = head; h < head + num_heads; h++)
            if (attends(h, page_token)) return true;
        return false;
    }
};

struct NoBias {
    static __device__ float add(const AttentionParams&, float logit, int /*head*/, int /*token*/, int /*seq_len*/) {
        return logit;
    }
};

// Press et al., Train Short, Test Long, arXiv:2108.12409. Zero at the newest token.
struct Alibi {
    static __device__ float add(const AttentionParams& p, float logit, int head, int token, int seq_len) {
        return logit + p.alibi_slopes[head] * float(token - seq_len + 1);
    }
};

}  // namespace cupy_paged
