"""Events, waits and scratch belong to the arrays' device, whichever is the current one.

CuPy is a stand-in here; tests/gpu/test_devices.py has the same on two GPUs.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cupy_paged import gpu, results
from cupy_paged.arrays import Array, array
from cupy_paged.streams import launch_stream, ordered
from support.fake_cupy import FakeCuPy

DEVICE, CUPY_STREAM, TORCH_STREAM, OTHER_STREAM = 1, 101, 201, 301


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuPy()
    monkeypatch.setattr(gpu, "cupy", lambda: fake)
    torch = SimpleNamespace(
        _C=SimpleNamespace(_cuda_getCurrentRawStream={0: 200, 1: TORCH_STREAM}.get)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    yield fake
    assert fake.device == 0, "the current device was left changed"


def on_device(framework):
    return Array("x", object(), framework, "float16", (4,), (1,), 0x1000, DEVICE, True)


def waits(stream, other, event):
    """What it takes to let `stream` wait for `other`."""
    return [
        (DEVICE, "eventCreate", event),
        (DEVICE, "eventRecord", event, other),
        (DEVICE, "streamWaitEvent", stream, event),
    ]


@pytest.mark.parametrize(
    ("owner", "stream", "other"),
    [("cupy", CUPY_STREAM, TORCH_STREAM), ("torch", TORCH_STREAM, CUPY_STREAM)],
)
def test_frameworks_wait_for_each_other_on_the_device_of_the_arrays(fake, owner, stream, other):
    arrays = [on_device("cupy"), on_device("torch")]
    with ordered(stream, DEVICE, owner, arrays):
        assert fake.take() == waits(stream, other, 1)
    assert fake.take() == waits(other, stream, 1)


@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_one_framework_waits_for_nobody(fake, framework):
    with ordered(OTHER_STREAM, DEVICE, framework, [on_device(framework)]):
        pass
    assert fake.calls == []


def test_a_capture_waits_for_nobody(fake):
    fake.capturing.add(CUPY_STREAM)
    arrays = [on_device(framework) for framework in ("cupy", "torch", "jax", "dlpack")]
    with ordered(CUPY_STREAM, DEVICE, "cupy", arrays):
        pass
    assert fake.take() == []


@pytest.mark.parametrize("stream", gpu.LEGACY_DEFAULT_STREAM)
def test_the_legacy_default_stream_is_not_asked_whether_it_is_captured(fake, stream):
    assert not gpu.is_capturing(DEVICE, stream)
    assert fake.calls == []


@pytest.mark.parametrize("captured", [False, True])
def test_a_capture_is_asked_for_on_the_device_of_the_stream(fake, captured):
    # The default stream of a thread has the same number, 2, on every device.
    fake.capturing.update([2] if captured else [])
    assert gpu.is_capturing(DEVICE, 2) == captured
    assert fake.calls == [(DEVICE, "streamIsCapturing", 2)]


class OnlyCudaArrayInterface:
    def __init__(self, **changes):
        self.changes = changes

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": (4,),
            "typestr": "<f2",
            "data": (0x1000, False),
            "version": 3,
            "stream": OTHER_STREAM,
            **self.changes,
        }


def test_a_cuda_array_interface_is_awaited_on_its_device(fake):
    fake.device_of_pointer[0x1000] = DEVICE
    x = OnlyCudaArrayInterface()
    assert launch_stream(x, None) == CUPY_STREAM
    assert array(x, "x", CUPY_STREAM).device == DEVICE
    assert fake.take() == waits(CUPY_STREAM, OTHER_STREAM, 1)
    fake.capturing.add(CUPY_STREAM)
    array(x, "x", CUPY_STREAM)
    assert fake.take() == []


def test_a_cuda_array_interface_without_a_stream_is_not_awaited(fake):
    fake.device_of_pointer[0x1000] = DEVICE
    array(OnlyCudaArrayInterface(stream=None), "x", CUPY_STREAM)
    array(OnlyCudaArrayInterface(), "x", None)
    assert fake.take() == []


@pytest.mark.parametrize(
    ("strides", "counted"), [(None, (6, 2, 1)), ((12, 4, 2), (6, 2, 1)), ((2, 40, 8), (1, 20, 4))]
)
@pytest.mark.parametrize("read_only", [False, True])
def test_what_a_cuda_array_interface_says(fake, strides, counted, read_only):
    fake.device_of_pointer[0x1000] = DEVICE
    x = OnlyCudaArrayInterface(shape=(5, 3, 2), strides=strides, data=(0x1000, read_only))
    found = array(x, "x", CUPY_STREAM)
    assert (found.dtype, found.shape, found.strides) == ("float16", (5, 3, 2), counted)
    assert (found.pointer, found.device, found.writable) == (0x1000, DEVICE, not read_only)


def test_an_empty_cuda_array_interface_is_on_the_current_device(fake):
    empty = OnlyCudaArrayInterface(shape=(0, 4), data=(0, False))
    with fake.cuda.Device(DEVICE):
        found = array(empty, "x", CUPY_STREAM)
    assert (found.pointer, found.device, found.is_packed()) == (0, DEVICE, True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": object()}, TypeError, "x: has a mask"),
        ({"typestr": "<f8"}, TypeError, "x: dtype float64 is not supported"),
        ({"typestr": ">f2"}, TypeError, "x: dtype .* is not supported"),
        ({"strides": (3,)}, ValueError, "x: strides .* no multiples of the 2-byte element"),
        ({"data": (0x1001, False)}, ValueError, "x: address 0x1001 is no multiple"),
    ],
)
def test_a_cuda_array_interface_that_no_op_can_take(fake, changes, error, message):
    fake.device_of_pointer.update({0x1000: DEVICE, 0x1001: DEVICE})
    with pytest.raises(error, match=f"^{message}"):
        array(OnlyCudaArrayInterface(**changes), "x", CUPY_STREAM)


class OnlyDLPack:
    """A GPU array for whoever asks where it is; what it exports is host memory."""

    def __init__(self, fake):
        self.fake, self.bits, self.asked = fake, np.zeros(4, np.float16), []

    def __dlpack_device__(self):
        return 2, DEVICE

    def __dlpack__(self, *, stream, max_version=None):
        self.asked.append((self.fake.device, stream))
        return self.bits.__dlpack__(max_version=max_version)


class ArrayImpl(OnlyDLPack):
    """As a JAX array, which is known by its module and name."""

    __module__ = "jax"
    dtype = np.dtype(np.float16)

    def devices(self):
        return [SimpleNamespace(platform="gpu")]


@pytest.mark.parametrize(("kind", "unordered"), [(OnlyDLPack, -1), (ArrayImpl, None)])
def test_a_dlpack_producer_exports_on_its_device_and_stays_out_of_a_capture(fake, kind, unordered):
    x = kind(fake)
    array(x, "x", 0)
    array(x, "x", CUPY_STREAM)
    fake.capturing.add(CUPY_STREAM)
    array(x, "x", CUPY_STREAM)
    assert x.asked == [(DEVICE, 1), (DEVICE, CUPY_STREAM), (DEVICE, unordered)]


@pytest.mark.parametrize("framework", ["cupy", "torch", "jax", "dlpack"])
def test_scratch_in_a_capture_belongs_to_the_graph(fake, framework):
    fake.capturing.add(OTHER_STREAM)
    with results.scratch_memory(on_device(framework), 4096, OTHER_STREAM) as pointer:
        assert fake.take() == [(DEVICE, "mallocAsync", 4096, OTHER_STREAM)]
    assert fake.take() == [(DEVICE, "freeAsync", pointer, OTHER_STREAM)]


def test_scratch_in_a_capture_is_released_in_it_when_the_op_fails(fake):
    fake.capturing.add(OTHER_STREAM)
    with (
        pytest.raises(RuntimeError, match="the op"),
        results.scratch_memory(on_device("torch"), 4096, OTHER_STREAM),
    ):
        raise RuntimeError("the op")
    assert [name for _, name, *_ in fake.take()] == ["mallocAsync", "freeAsync"]
