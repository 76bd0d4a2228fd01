"""FlashInfer's batch decode, on CUDA cores and on tensor cores. Needs torch, nvcc and ninja."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.data import DataSets
from benchmarks.frameworks import Torch
from benchmarks.ours import empty
from benchmarks.prepared import Like, Prepared

VARIANTS = ("CUDA cores", "tensor cores")
ARRANGEMENT = "HND"
WORKSPACE_BYTES = 256 << 20


def version() -> str:
    import flashinfer

    Torch()
    return flashinfer.__version__


def page_indices(tables: np.ndarray, blocks_per_seq: tuple[int, ...]) -> np.ndarray:
    """The live entries of block tables, one sequence after the other."""
    live = np.arange(tables.shape[1]) < np.array(blocks_per_seq)[:, None]
    return tables[live]


def prepare(variant: str, sets: DataSets, device: Any) -> Prepared:
    import flashinfer

    arrays = Torch()
    torch, shape = arrays.torch, sets.shape
    key, value, _ = sets.caches(arrays, ARRANGEMENT)
    queries = sets.query_views(arrays)
    outs = empty(device, arrays, sets.dtype, sets.query_shape)
    indptr = np.concatenate([[0], np.cumsum(shape.blocks_per_seq)]).astype(np.int32)
    last_page_len = ((sets.seq_lens - 1) % shape.block_size + 1).astype(np.int32)
    # Calls run one after the other, so one workspace serves all of them.
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=arrays.device)

    def call(i: int) -> Callable[[], Any]:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, ARRANGEMENT, use_tensor_cores=variant == "tensor cores"
        )
        wrapper.plan(
            torch.from_numpy(indptr),
            arrays.array(page_indices(sets.tables[i], shape.blocks_per_seq)),
            torch.from_numpy(last_page_len),
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_size,
            shape.block_size,
            q_data_type=queries.dtype,
            kv_data_type=key.dtype,
        )
        query, out = queries[i], outs[i]
        return lambda: wrapper.run(query, (key, value), out=out)

    return Prepared(
        arrays,
        [call(i) for i in range(sets.num_sets)],
        lambda: arrays.floats(outs[-1], sets.dtype),
        Like(ARRANGEMENT, sets.tables, shape.default_scale),
    )
