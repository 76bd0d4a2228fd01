"""CuPy, torch and JAX at work on streams of their own, with more queued than the device has done.

A worker makes its stream its framework's current one inside `with`. JAX has a stream that it tells
nobody.
"""

import cupy
import numpy as np

spin = cupy.RawKernel(
    'extern "C" __global__ void spin(long long cycles) {'
    " long long start = clock64(); while (clock64() - start < cycles); }",
    "spin",
)
CYCLES_PER_MS = 1_600_000


def delay(address, milliseconds=100):
    """Keeps a stream busy for about so long: by default, while a test queues all that it queues."""
    with cupy.cuda.ExternalStream(address):
        spin((1,), (1,), (np.int64(milliseconds * CYCLES_PER_MS),))


def is_busy(address):
    return not cupy.cuda.ExternalStream(address).done


class OnAStream:
    """What CuPy and torch spell alike; their streams wait for no other."""

    writable = True

    def lines(self, table):
        """Gives `late` the lines of an array to choose from."""
        self._table = self.arrays.array(table)
        self._line = self.full(table.shape[1:], np.nan)

    def late(self, i, milliseconds):
        """An array that is to hold line `i`, and is not written for about so long."""
        delay(self.address, milliseconds)
        self._line[...] = self._table[i]
        return self._line

    def is_late(self, array):
        return is_busy(self.address)

    def reader(self, shape, rounds):
        """(read, found): one keeps the contents of an array, the other returns all that was kept.

        They are read on the worker's stream, and nobody waits for it.
        """
        kept = self.full((rounds, *shape), np.nan)

        def read(i, array):
            kept[i] = array

        return read, lambda: self.arrays.numpy(kept)


class CuPyWorker(OnAStream):
    def __init__(self, arrays):
        self.name, self.arrays = "cupy", arrays
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.address = self.stream.ptr

    def __enter__(self):
        self.stream.__enter__()

    def __exit__(self, *error):
        self.stream.__exit__(*error)

    def full(self, shape, number):
        """A new array of float16, written in the order of the stream."""
        return cupy.full(shape, number, np.float16)

    def address_of(self, array):
        return array.data.ptr


class TorchWorker(OnAStream):
    def __init__(self, arrays):
        self.name, self.arrays, self.torch = "torch", arrays, arrays.torch
        self.stream = self.torch.cuda.Stream(arrays.device)
        self.address, self._entered = self.stream.cuda_stream, []

    def __enter__(self):
        self._entered.append(self.torch.cuda.stream(self.stream))
        self._entered[-1].__enter__()

    def __exit__(self, *error):
        self._entered.pop().__exit__(*error)

    def full(self, shape, number):
        return self.torch.full(shape, number, dtype=self.torch.float16, device=self.arrays.device)

    def address_of(self, array):
        return array.data_ptr()


class JaxWorker:
    """Each array is a new one. What delays it is products of matrices."""

    writable = False

    def __init__(self, arrays):
        self.name, self.arrays = "jax", arrays
        self._numpy, jit = arrays.jax.numpy, arrays.jax.jit
        self._short, self._long = (self._numpy.zeros((size, size)) for size in (1024, 8192))
        self._full = jit(
            lambda number, shape: self._numpy.full(shape, number, np.float16), static_argnums=1
        )
        self._late_line = jit(lambda table, i, x: table[i] + self._zero_after(x))
        self.negative = jit(self._numpy.negative)

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass

    @staticmethod
    def _zero_after(x):
        for _ in range(4):
            x = x @ x
        return (0 * x[0, 0]).astype(np.float16)

    def full(self, shape, number):
        return self._full(number, shape)

    def lines(self, table):
        self._table = self.arrays.array(table)
        for milliseconds in (0, 20):
            self.late(0, milliseconds).block_until_ready()  # to compile takes longer than a delay

    def late(self, i, milliseconds):
        return self._late_line(self._table, i, self._short if milliseconds < 1 else self._long)

    def is_late(self, array):
        return not array.is_ready()

    def reader(self, shape, rounds):
        negatives = []  # jax.jit would return what it does not change without reading it

        def read(i, array):
            negatives.append(self.negative(array))

        return read, lambda: -np.stack([self.arrays.numpy(x) for x in negatives])

    def address_of(self, array):
        return array.unsafe_buffer_pointer()


def worker(arrays):
    return {"cupy": CuPyWorker, "torch": TorchWorker, "jax": JaxWorker}[arrays.name](arrays)
