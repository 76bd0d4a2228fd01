"""GPU arrays that only protocols describe: those of Numba and cuda.core, and producers of our own.

A producer makes such arrays with the contents of CuPy's, and views of them that are CuPy's.
"""

import importlib

import cupy


class Recording:
    """A DLPack array that writes down what its consumers ask for."""

    def __init__(self, array):
        self.array, self.asked = array, []

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class VersionedArray(Recording):
    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        capsule = self.array.__dlpack__(stream=stream, max_version=max_version)
        self.asked.append((stream, max_version))
        assert "dltensor_versioned" in repr(capsule), "CuPy gave an old capsule"
        return capsule


class UnversionedArray(Recording):
    """Of the time before the protocol's version 1."""

    def __dlpack__(self, stream=None):
        capsule = self.array.__dlpack__(stream=stream)
        self.asked.append((stream, None))
        assert "dltensor_versioned" not in repr(capsule), "CuPy gave a new capsule"
        return capsule


class Own:
    """Producers of our own; `kind` is one of the classes above."""

    def __init__(self, name, kind):
        self.name, self._kind = name, kind

    def array(self, array):
        return self._kind(array.copy())

    def cupy(self, array):
        return array.array


class Numba:
    """Known by the CUDA array interface alone."""

    name = "numba"

    def __init__(self):
        importlib.import_module("numba")
        self.cuda = importlib.import_module("numba.cuda")

    def array(self, array, stream=0):
        """Numba's own memory, whose interface names the stream where there is one."""
        made = self.cuda.device_array(array.shape, array.dtype, stream=stream)
        cupy.asarray(made)[...] = array
        cupy.cuda.get_current_stream().synchronize()
        return made

    def cupy(self, array):
        return cupy.asarray(array)


class CudaCore:
    """Views with a shape and a dtype of cuda.core's buffers, which are bytes."""

    name = "cuda.core"

    def __init__(self):
        self.core = importlib.import_module("cuda.core")
        self.view_kind = importlib.import_module("cuda.core.utils").StridedMemoryView

    def array(self, array):
        device = self.core.Device(array.device.id)
        device.set_current()
        buffer = device.allocate(array.nbytes, stream=device.default_stream)
        device.sync()
        view = self.view_kind.from_buffer(buffer, shape=array.shape, dtype=array.dtype)
        cupy.from_dlpack(view)[...] = array
        cupy.cuda.get_current_stream().synchronize()
        return view

    def cupy(self, array):
        return cupy.from_dlpack(array)


MAKERS = {
    "versioned": lambda: Own("versioned", VersionedArray),
    "unversioned": lambda: Own("unversioned", UnversionedArray),
    "numba": Numba,
    "cuda.core": CudaCore,
}
