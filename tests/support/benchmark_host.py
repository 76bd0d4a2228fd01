"""Stand-ins for the GPU and for its arrays, on which benchmarks run on the host."""

import numpy as np

from benchmarks import data, device, frameworks
from benchmarks.results import Result
from benchmarks.runner import Runner
from benchmarks.shapes import LAYOUTS, Case, Shape
from cupy_paged.dtypes import STORAGE, decode, itemsize


class HostDevice:
    """Memory of the host. `lost` is what a broken device says from then on."""

    num_multiprocessors, sm = 4, 90

    def __init__(self):
        self.lost, self.reads = None, []

    def memory(self, num_bytes):
        # Aligned as CuPy's is.
        whole = np.zeros(num_bytes + 512, np.uint8)
        start = -whole.ctypes.data % 512
        return whole[start : start + num_bytes]

    def fill(self, memory, dtype, seed):
        rng = np.random.default_rng(seed)
        memory.view(STORAGE[dtype])[:] = rng.choice(
            device.normal_table(dtype), memory.size // itemsize(dtype)
        )

    def pinned(self, num_bytes):
        return self.memory(num_bytes)

    def copy(self, target, source):
        assert target.nbytes == source.nbytes
        target[:] = source

    def spoil(self, memory):
        memory[:] = 255

    def read(self, variant, memory, start, num_bytes):
        self.reads.append((start, memory[start : start + num_bytes].size))

    def synchronize(self):
        if self.lost:
            raise RuntimeError(self.lost)

    def release(self):
        pass


class FakeClock:
    """Says that each launch took `microseconds`, but for the one after a wait, which took more."""

    def __init__(self, microseconds):
        self.now, self.waits, self.microseconds_of_launch = 0.0, 0, microseconds
        self.idle = True

    def stamp(self):
        return self.now

    def microseconds(self, first, second):
        return second - first

    def wait(self):
        self.waits += 1
        self.idle = True

    def pass_launch(self):
        self.now += self.microseconds_of_launch + (1000 if self.idle else 0)
        self.idle = False


class FakeReplay:
    def __init__(self, calls, microseconds=100.0):
        self.count, self.calls, self.clock = len(calls), calls, FakeClock(microseconds)
        self.launches = 0

    def launch(self):
        self.launches += 1
        if self.launches == 1:
            for call in self.calls:
                call()
        self.clock.pass_launch()


class HostArrays:
    name = "numpy"

    def view(self, memory, dtype, shape, strides=None, offset=0):
        kind = frameworks.numpy_dtype(dtype)
        in_bytes = None if strides is None else [s * kind.itemsize for s in strides]
        return np.ndarray(shape, kind, memory, offset, in_bytes)

    def array(self, host):
        return host

    def floats(self, array, dtype, rows=None):
        bits = array.view(STORAGE[dtype])
        return decode(bits if rows is None else bits[rows], dtype, np.float32)

    def capture(self, calls):
        calls[0]()
        return FakeReplay(calls)


def small_runner(tmp_path, monkeypatch):
    """A runner on the host, whose data sets are two and small."""
    monkeypatch.setattr(data, "MIN_BYTES", 1)
    result = Result({"device": "none"}, {}, {}, [])
    arrays = HostArrays()
    shown = []
    made = Runner(HostDevice(), arrays, arrays, result, tmp_path / "r.json", show=shown.append)
    made.shown = shown
    return made


def small_case(dtypes="bf16", layouts=LAYOUTS, seq_lens=(40, 7, 33)):
    return Case("anchors", Shape("small", seq_lens, 6, 2, 16), dtypes, layouts)


def attend(query, keys, values, scale):
    """float64 attention of query [num_heads, d] over keys and values [num_kv_heads, n, d]."""
    group = len(query) // len(keys)
    out = []
    for head, q in enumerate(query.astype(np.float64)):
        k, v = keys[head // group].astype(np.float64), values[head // group]
        scores = k @ q * scale
        weights = np.exp(scores - scores.max())
        out.append(weights @ v / weights.sum())
    return np.array(out)
