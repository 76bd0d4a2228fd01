"""Which tokens a query may attend to, besides those before it."""

from typing import NamedTuple


class BlockSparse(NamedTuple):
    """vLLM's block-sparse rule: a window of local blocks, plus every `vert_stride`-th block.

    Time is cut into blocks of `block_size` tokens, counted separately from cache blocks.
    With `q` the block of the newest token, a cache block whose first token lies in block `k`
    is attended if `k > q - local_blocks`, or if `(k + offset) % vert_stride == 0`, where
    `offset` slides by `head_sliding_step` from one query head to the next (by its negation
    from one KV head to the next, if negative).

    `block_size` here must be a multiple of the cache's block size.
    """

    local_blocks: int
    vert_stride: int
    block_size: int
    head_sliding_step: int
    tp_rank: int = 0

    def head_offset(self, head: int, num_heads: int, num_kv_heads: int) -> int:
        """The offset of query head `head`; head counts are those of this rank."""
        step = self.head_sliding_step
        if step >= 0:
            return (self.tp_rank * num_heads + head) * step + 1
        kv_head = head // (num_heads // num_kv_heads)
        return (self.tp_rank * num_kv_heads + kv_head) * -step + 1
