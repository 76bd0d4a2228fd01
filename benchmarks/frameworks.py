"""The arrays of each framework over memory of the device, and how it replays calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.timing import Clock, CudaClock, WallClock
from cupy_paged.dtypes import STORAGE, decode, is_fp8, itemsize

CHAIN = 4  # rounds over all data sets between two waits, where no graph can be captured

Calls = Sequence[Callable[[], Any]]


def numpy_dtype(dtype: str) -> np.dtype:
    """What CuPy and NumPy call a dtype; fp8 is bytes to them."""
    if dtype != "bfloat16":
        return STORAGE[dtype]
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


class Graph:
    """A captured CUDA graph. Holds the calls, whose arrays the graph knows by address alone."""

    def __init__(self, launch: Callable[[], None], stream: int, calls: Calls) -> None:
        self.launch, self.count, self._calls = launch, len(calls), calls
        self.clock: Clock = CudaClock(stream)


class CuPy:
    name = "cupy"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def view(
        self,
        memory: Any,
        dtype: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
    ) -> Any:
        """An array in memory, from byte `offset` on; strides count elements."""
        kind = numpy_dtype(dtype)
        in_bytes = None if strides is None else tuple(s * kind.itemsize for s in strides)
        return self._cupy.ndarray(shape, kind, memory.data + offset, in_bytes)

    def array(self, host: np.ndarray) -> Any:
        return self._cupy.asarray(host)

    def floats(self, array: Any, dtype: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Values of an array, or of some of its rows, as float32 on the host."""
        bits = array.view(STORAGE[dtype])
        if rows is not None:
            bits = bits[self._cupy.asarray(rows)]
        return decode(bits.get(), dtype, np.float32)

    def capture(self, calls: Calls) -> Graph:
        stream = self._cupy.cuda.Stream(non_blocking=True)
        self._cupy.cuda.Device().synchronize()  # data was made on another stream
        with stream:
            calls[0]()  # compiles
            stream.synchronize()
            stream.begin_capture(self._cupy.cuda.runtime.streamCaptureModeGlobal)
            for call in calls:
                call()
            graph = stream.end_capture()
        return Graph(lambda: graph.launch(stream), stream.ptr, calls)


class Torch:
    name = "torch"

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ImportError("torch sees no CUDA device")
        self.torch, self.device = torch, "cuda"

    def view(
        self,
        memory: Any,
        dtype: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        offset: int = 0,
    ) -> Any:
        end = offset + (memory.size - offset) // itemsize(dtype) * itemsize(dtype)
        flat = self.torch.from_dlpack(memory)[offset:end].view(getattr(self.torch, dtype))
        if strides is None:
            strides = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
        return flat.as_strided(shape, strides)

    def array(self, host: np.ndarray) -> Any:
        return self.torch.from_numpy(np.ascontiguousarray(host)).to(self.device)

    def floats(self, array: Any, dtype: str) -> np.ndarray:
        return array.float().cpu().numpy()

    def capture(self, calls: Calls) -> Graph:
        cuda = self.torch.cuda
        stream = cuda.Stream()
        cuda.synchronize()
        with cuda.stream(stream):
            calls[0]()
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=stream):
            for call in calls:
                call()

        def launch() -> None:
            with cuda.stream(stream):
                graph.replay()

        return Graph(launch, stream.cuda_stream, calls)


class Chain:
    """JAX's calls one after the other, from the host; JAX runs them in order on its own stream."""

    def __init__(self, calls: Calls, wait: Callable[[Any], Any]) -> None:
        self._calls, self.count = calls, CHAIN * len(calls)
        self._last: Any = None
        self.clock: Clock = WallClock(lambda: wait(self._last))

    def launch(self) -> None:
        for _ in range(CHAIN):
            for call in self._calls:
                self._last = call()


class Jax:
    name = "jax"

    def __init__(self) -> None:
        import os

        # JAX would take most of the device's memory for itself.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        import jax

        try:
            jax.devices("cuda")
        except RuntimeError as error:
            raise ImportError("JAX sees no CUDA device") from error
        self.jax = jax
        self._cupy = CuPy()

    def view(self, memory: Any, dtype: str, shape: tuple[int, ...], offset: int = 0) -> Any:
        if is_fp8(dtype):
            raise TypeError(f"{dtype} memory cannot be handed to JAX")
        return self.jax.dlpack.from_dlpack(self._cupy.view(memory, dtype, shape, offset=offset))

    def array(self, host: np.ndarray) -> Any:
        return self.jax.numpy.asarray(host)

    def floats(self, array: Any, dtype: str) -> np.ndarray:
        return np.asarray(array).astype(np.float32)

    def capture(self, calls: Calls) -> Chain:
        self.jax.block_until_ready(calls[0]())
        return Chain(calls, self.jax.block_until_ready)
