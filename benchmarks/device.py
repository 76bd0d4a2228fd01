"""Memory of the GPU, and the two kernels of the benchmarks: one fills it, one reads it."""

from __future__ import annotations

import functools
import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.floor import Variant
from cupy_paged.dtypes import encode

HERE = Path(__file__).parent
OPTIONS = ("--std=c++17",)
TABLE_SIZE = 8192
FILL_THREADS = 256


@functools.cache
def normal_table(dtype: str) -> np.ndarray:
    """Standard normal values, in the storage of a dtype."""
    return encode(np.random.default_rng(0).standard_normal(TABLE_SIZE), dtype)


def source(filename: str) -> str:
    return (HERE / filename).read_text(encoding="utf-8")


class Device:
    """CuPy's current device. Memory is a one-dimensional array of bytes."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        attributes = cupy.cuda.Device().attributes
        self.num_multiprocessors: int = attributes["MultiProcessorCount"]
        self.sm = int(cupy.cuda.Device().compute_capability)
        self._tables: dict[str, Any] = {}
        self._sink = cupy.zeros(1, np.uint32)
        self._kernel = functools.cache(self._load)

    def _load(self, filename: str, name: str) -> Any:
        module = self._cupy.RawModule(
            code=source(filename), options=OPTIONS, name_expressions=(name,)
        )
        return module.get_function(name)

    def memory(self, num_bytes: int) -> Any:
        return self._cupy.empty(num_bytes, np.uint8)

    def fill(self, memory: Any, dtype: str, seed: int) -> None:
        """Fills memory with normal values of a dtype."""
        if dtype not in self._tables:
            self._tables[dtype] = self._cupy.asarray(normal_table(dtype))
        table = self._tables[dtype]
        bits = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int"}[table.itemsize]
        blocks = 8 * self.num_multiprocessors
        count = np.int64(memory.size // table.itemsize)
        self._kernel("fill.cu", f"fill<{bits}>")(
            (blocks,),
            (FILL_THREADS,),
            (memory, count, table, np.int32(TABLE_SIZE), np.int64(seed)),
        )

    def pinned(self, num_bytes: int) -> np.ndarray:
        """Memory of the host that the device copies from and to by itself."""
        import cupyx

        return cupyx.empty_pinned(num_bytes, np.uint8)

    def copy(self, target: Any, source: Any) -> None:
        """Queues the driver's copy of bytes, between here and here or pinned memory."""
        ends = [
            x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr for x in (target, source)
        ]
        cuda = self._cupy.cuda
        cuda.runtime.memcpyAsync(
            *ends, source.nbytes, cuda.runtime.memcpyDefault, cuda.get_current_stream().ptr
        )

    def spoil(self, memory: Any) -> None:
        """Fills memory with NaN, in any dtype."""
        memory.data.memset(255, memory.nbytes)

    def read(self, variant: Variant, memory: Any, start: int, num_bytes: int) -> None:
        """Queues a streaming read on the current stream."""
        count = num_bytes // 16
        kernel = self._kernel("streaming_read.cu", variant.kernel)
        kernel(
            (variant.grid(count, self.num_multiprocessors),),
            (variant.threads,),
            (memory[start : start + num_bytes], np.int64(count), self._sink),
        )

    def synchronize(self) -> None:
        self._cupy.cuda.Device().synchronize()

    def release(self) -> None:
        """Gives memory that nobody uses back to the device."""
        gc.collect()
        self._cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
