"""A stand-in for CuPy that runs nothing: it writes down each call and the device it was made on.

With `ndarray` and `Tensor`, arrays that say they are on a device, whole ops run up to their launch.
"""

import ctypes
import itertools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from cupy_paged import compiler, gpu
from cupy_paged.kernel_cache import Binary

BLOCKS_PER_SM, NUM_SMS = 2, 132
APART = 2**32
"""Every piece of new memory has an address that is a multiple of this."""
FIRST_CONTEXT = 5000
"""The context of the first device; the others follow."""
NEW_STREAM = 999
"""Every stream that is made here."""
IMAGE = b"a compiled kernel"


class FakeCuPy:
    """`calls` lists (device, name, *arguments); streams and events are known by number alone."""

    def __init__(self, sm=90):
        self.device = 0
        self.calls = []
        self.capturing = set()
        self.finished = set()
        self.current_streams = {0: 100, 1: 101}
        self.device_of_pointer = {}
        self.functions = {}
        self.has_context = True
        self.addresses = itertools.count(APART, APART)
        fake = self

        class Device:
            compute_capability = str(sm)
            attributes = {  # noqa: RUF012
                "MaxSharedMemoryPerBlockOptin": 227 * 1024,
                "MultiProcessorCount": NUM_SMS,
            }

            def __init__(self, device=None):
                self.entered = fake.device if device is None else device

            def __enter__(self):
                self.left, fake.device = fake.device, self.entered

            def __exit__(self, *_):
                fake.device = self.left

        class Event:
            def __init__(self, disable_timing):
                assert disable_timing
                self.ptr = 1 + sum(name == "eventCreate" for _, name, *_ in fake.calls)
                fake.log("eventCreate", self.ptr)

            @property
            def done(self):
                return self.ptr in fake.finished

        class Stream:
            """One of CuPy's own, or somebody else's: the current one inside a `with`."""

            ptr = NEW_STREAM

            def __init__(self, non_blocking):
                assert non_blocking

            @classmethod
            def from_external(cls, foreign):
                stream = cls(non_blocking=True)
                stream.ptr = foreign.__cuda_stream__()[1]
                return stream

            def __enter__(self):
                self.left = fake.device, fake.current_streams[fake.device]
                fake.current_streams[fake.device] = self.ptr
                return self

            def __exit__(self, *_):
                device, stream = self.left
                fake.current_streams[device] = stream

            def synchronize(self):
                fake.log("streamSynchronize", self.ptr)

        def stream_is_capturing(stream):
            fake.log("streamIsCapturing", stream)
            return stream in fake.capturing

        def malloc_async(num_bytes, stream):
            fake.log("mallocAsync", num_bytes, stream)
            return 0xA000

        def memory(num_bytes):
            return SimpleNamespace(ptr=next(fake.addresses), device_id=fake.device)

        def alloc(num_bytes):
            found = memory(num_bytes)
            fake.log("alloc", found.ptr, num_bytes, fake.current_streams[fake.device])
            return found

        def new_array(shape, dtype):
            return ndarray.packed(shape, dtype, alloc(int(np.prod(shape)) * dtype.itemsize))

        class Module:
            def load(self, image):
                assert image == IMAGE

            def get_function(self, symbol):
                ptr = 1 + len(fake.functions)
                fake.functions[ptr] = symbol
                fake.log("loadKernel", symbol)
                return SimpleNamespace(ptr=ptr)

        def set_device(device):
            assert isinstance(device, int)
            fake.device, fake.has_context = device, True

        def set_context(context):
            fake.device = context - FIRST_CONTEXT

        def launch_kernel(function, gx, gy, gz, bx, by, bz, shared_bytes, stream, arguments, extra):
            assert fake.has_context, "no context in this thread"
            assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
            fake.log("launchKernel", fake.functions[function], gx, bx, shared_bytes, stream)
            fake.launched(ctypes.c_void_p.from_address(arguments).value)

        self.ndarray = new_array
        self.launched = lambda address: None
        self.cuda = SimpleNamespace(
            Device=Device,
            Event=Event,
            Stream=Stream,
            Memory=memory,
            Module=Module,
            alloc=alloc,
            get_current_stream=lambda device=None: SimpleNamespace(
                ptr=fake.current_streams[fake.device if device is None else device]
            ),
            runtime=SimpleNamespace(
                getDevice=lambda: fake.device,
                setDevice=set_device,
                eventRecord=lambda event, stream: fake.log("eventRecord", event, stream),
                streamWaitEvent=lambda stream, event: fake.log("streamWaitEvent", stream, event),
                streamIsCapturing=stream_is_capturing,
                mallocAsync=malloc_async,
                freeAsync=lambda pointer, stream: fake.log("freeAsync", pointer, stream),
                memsetAsync=lambda pointer, value, num_bytes, stream: fake.log(
                    "memsetAsync", pointer, value, num_bytes, stream
                ),
                pointerGetAttributes=lambda pointer: SimpleNamespace(
                    device=fake.device_of_pointer[pointer]
                ),
            ),
            driver=SimpleNamespace(
                ctxGetCurrent=lambda: fake.has_context and FIRST_CONTEXT + fake.device,
                ctxSetCurrent=set_context,
                launchKernel=launch_kernel,
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
                funcSetAttribute=lambda function, attribute, value: None,
                occupancyMaxActiveBlocksPerMultiprocessor=lambda *_: BLOCKS_PER_SM,
            ),
        )

    def install(self, monkeypatch):
        """Makes it the CuPy of all ops; no kernel is compiled for it, nor looked for on disk."""
        monkeypatch.setattr(gpu, "cupy", lambda: self)
        monkeypatch.setattr(compiler, "_loaded", {})
        monkeypatch.setattr(compiler, "binary_of", lambda kernel, *_: Binary(kernel.name, IMAGE))

    def log(self, name, *arguments):
        self.calls.append((self.device, name, *arguments))

    def take(self):
        """The calls since the last time, without questions."""
        calls, self.calls = self.calls, []
        return [call for call in calls if call[1] != "streamIsCapturing"]


class ndarray:
    """As a CuPy array, which is known by its module and name; its address is a host array's."""

    __module__ = "cupy"
    __hash__ = None

    def __init__(self, host, device=0):
        self.host = host
        self.dtype, self.shape, self.strides = host.dtype, host.shape, host.strides
        self.itemsize = host.itemsize
        self.data = SimpleNamespace(ptr=host.ctypes.data, device_id=device)

    @classmethod
    def packed(cls, shape, dtype, memory):
        made = cls(np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, writeable=False))
        made.strides = np.empty((0, *shape[1:]), dtype).strides
        made.data = memory
        return made


class TorchDevice(NamedTuple):
    type: str
    index: int


class Tensor:
    """As a torch tensor, in the same way."""

    __module__ = "torch"

    def __init__(self, host, device=0):
        self.host = host
        self.dtype, self.shape = f"torch.{host.dtype.name}", host.shape
        self.device, self._ptr = TorchDevice("cuda", device), host.ctypes.data

    def stride(self):
        return tuple(stride // self.host.itemsize for stride in self.host.strides)

    def data_ptr(self):
        return self._ptr


class FakeTorch:
    """torch, as far as it is asked; its memory is logged by the FakeCuPy beside it."""

    Tensor = Tensor

    def __init__(self, fake):
        self.current_streams = {0: 200, 1: 201}
        self.remembered_device = None
        self.lent = set()
        self._C = SimpleNamespace(
            _cuda_getCurrentRawStream=self.current_streams.__getitem__,
            _cuda_getDevice=self._device,
            _cuda_cudaCachingAllocator_raw_alloc=self._alloc,
            _cuda_cudaCachingAllocator_raw_delete=self.lent.remove,
        )
        self.cuda = SimpleNamespace(
            ExternalStream=lambda stream, device: (stream, device),
            init=lambda: None,
            stream=self._stream,
        )
        self._fake = fake

    def __getattr__(self, dtype):
        return f"torch.{dtype}"

    def _device(self):
        return self._fake.device if self.remembered_device is None else self.remembered_device

    def _alloc(self, num_bytes, stream):
        address = next(self._fake.addresses)
        self.lent.add(address)
        self._fake.log("torch.alloc", address, num_bytes, stream)
        return address

    def empty(self, *shape, dtype, device):
        host = np.empty(shape, dtype.removeprefix("torch."))
        made = Tensor(host, device.index)
        made._ptr = next(self._fake.addresses)
        stream = self.current_streams[device.index]
        self._fake.log("torch.empty", made._ptr, host.nbytes, stream)
        return made

    def _stream(self, external):
        fake_torch, (stream, device) = self, external

        class Current:
            def __enter__(self):
                self.left = fake_torch.current_streams[device]
                fake_torch.current_streams[device] = stream

            def __exit__(self, *_):
                fake_torch.current_streams[device] = self.left

        return Current()


def host_empty(leader, name, shape, dtype, stream):
    """In the place of `cupy_paged.results.empty`: zeros on the host, also for a device."""
    made = np.zeros(shape, dtype)
    return SimpleNamespace(owner=made, pointer=made.ctypes.data, bits=made)
