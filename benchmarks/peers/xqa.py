"""XQA, TensorRT-LLM's decode kernels, through FlashInfer. With fp8 caches the query is fp8 too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.data import DataSets
from benchmarks.frameworks import Torch
from benchmarks.ours import empty
from benchmarks.peers import flashinfer_decode
from benchmarks.prepared import Like, Prepared, Unsupported

VARIANTS = ("",)
ARRANGEMENT = "NHD"
BLOCK_SIZES = (16, 32, 64, 128)
WORKSPACE_BYTES = 256 << 20

version = flashinfer_decode.version


def num_semaphores(sequences: int) -> int:
    """As FlashInfer's own test has it; `sequences` are those of every KV head."""
    return sequences + sequences % 2 + 2 + sequences + 2


def prepare(variant: str, sets: DataSets, device: Any) -> Prepared:
    shape = sets.shape
    if shape.block_size not in BLOCK_SIZES:
        raise Unsupported(f"block_size {shape.block_size}")
    from flashinfer.xqa import xqa

    arrays = Torch()
    torch = arrays.torch
    key, value, _ = sets.caches(arrays, ARRANGEMENT)
    queries = sets.query_views(arrays)
    outs = empty(device, arrays, sets.dtype, sets.query_shape)
    tables = arrays.array(sets.tables)
    seq_lens = arrays.array(sets.seq_lens.astype(np.uint32)[:, None])
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=arrays.device)
    semaphores = torch.zeros(
        num_semaphores(shape.batch * shape.num_kv_heads), dtype=torch.uint32, device=arrays.device
    )

    def call(i: int) -> Callable[[], Any]:
        # A beam of one: [batch, 1, num_heads, head_size].
        query, out, table = queries[i].unsqueeze(1), outs[i].unsqueeze(1), tables[i]
        return lambda: xqa(
            query,
            key,
            value,
            table,
            seq_lens,
            out,
            workspace,
            semaphores,
            shape.num_kv_heads,
            shape.block_size,
            kv_layout=ARRANGEMENT,
        )

    return Prepared(
        arrays,
        [call(i) for i in range(sets.num_sets)],
        lambda: arrays.floats(outs[-1], sets.dtype),
        Like(ARRANGEMENT, sets.tables, shape.default_scale),
    )
