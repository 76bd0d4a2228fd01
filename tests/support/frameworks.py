"""Arrays of each framework, made from NumPy arrays bit by bit and brought back the same way.

`CUPY_PAGED_TEST_FRAMEWORKS` (comma-separated) names the frameworks that must be there: a named
one that is missing fails its tests, one not named and not installed is not parametrised, and tests
of its own are skipped: see `only`. It may name transformers as well, which has no arrays of its
own: see `needed`.
"""

import functools
import importlib
import importlib.util
import os

import numpy as np
import pytest

REQUIRED = frozenset(filter(None, os.environ.get("CUPY_PAGED_TEST_FRAMEWORKS", "").split(",")))


def _buffer(array):
    """The bytes of the array that owns `array`'s memory, and where in it `array` begins."""
    if array.size == 0:
        return np.zeros(array.itemsize, np.uint8), 0
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if not owner.flags.c_contiguous:
        owner = array = array.copy(order="C")
    start = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
    return owner.reshape(-1).view(np.uint8), start


class NumPy:
    """Host arrays; the identity, but for a copy that keeps the strides."""

    name = "numpy"
    writable = True
    float8 = True

    def array(self, array):
        buffer, start = _buffer(array)
        return np.ndarray(array.shape, array.dtype, buffer.copy(), start, array.strides)

    def numpy(self, array):
        assert isinstance(array, np.ndarray)
        return array

    def owns(self, array):
        return isinstance(array, np.ndarray)


class Torch:
    """torch tensors on `device`, which is whole with its number; strides are kept."""

    writable = True
    float8 = True

    def __init__(self, device):
        self.name = "torch"
        self.torch = importlib.import_module("torch")
        self.device = self.torch.device(device)
        if self.device.type == "cuda" and not self.torch.cuda.is_available():
            raise ImportError("torch sees no CUDA device")

    def array(self, array):
        buffer, start = _buffer(array)
        item = array.dtype.itemsize
        dtype = getattr(self.torch, array.dtype.name)
        flat = self.torch.from_numpy(buffer.copy()).to(self.device).view(dtype)
        strides = [stride // item for stride in array.strides]
        return self.torch.as_strided(flat, array.shape, strides, start // item)

    def fill(self, array, new):
        array.copy_(self.array(new))

    def synchronize(self):
        self.torch.cuda.synchronize(self.device)

    def numpy(self, array):
        dtype = np.dtype(_numpy_dtype(str(array.dtype).removeprefix("torch.")))
        flat = array.detach().cpu().contiguous().reshape(-1)
        return flat.view(self.torch.uint8).numpy().view(dtype).reshape(array.shape)

    def owns(self, array):
        return isinstance(array, self.torch.Tensor) and array.device == self.device


class Jax:
    """JAX arrays on a device of `platform`; always contiguous, never written."""

    writable = False
    float8 = True

    def __init__(self, platform, index=0):
        self.name = "jax"
        self.jax = importlib.import_module("jax")
        try:
            self.device = self.jax.devices(platform)[index]
        except (RuntimeError, IndexError) as error:
            raise ImportError(f"JAX sees no {platform} device {index}") from error

    def array(self, array):
        return self.jax.device_put(np.ascontiguousarray(array), self.device)

    def numpy(self, array):
        return np.array(array)

    def owns(self, array):
        return isinstance(array, self.jax.Array) and array.devices() == {self.device}


class CuPy:
    """CuPy arrays on a device; strides are kept. CuPy has no float8: those become uint8."""

    name = "cupy"
    writable = True
    float8 = False

    def __init__(self, index=0):
        self.cupy = importlib.import_module("cupy")
        if not self.cupy.is_available():
            raise ImportError("CuPy sees no CUDA device")
        self.device = self.cupy.cuda.Device(index)

    def array(self, array):
        if array.dtype.name.startswith("float8"):
            array = array.view(np.uint8)
        buffer, start = _buffer(array)
        with self.device:
            memory = self.cupy.asarray(buffer).data + start
            return self.cupy.ndarray(array.shape, array.dtype, memory, array.strides)

    def fill(self, array, new):
        with self.device:
            self._bits(array)[...] = self._bits(self.array(new))

    def synchronize(self):
        self.device.synchronize()

    def numpy(self, array):
        with self.device:
            return self._bits(array).get().view(array.dtype)

    def owns(self, array):
        return isinstance(array, self.cupy.ndarray) and array.device == self.device

    def _bits(self, array):
        """`array` as unsigned integers: CuPy moves those without knowing bfloat16."""
        return array.view(f"u{array.dtype.itemsize}")


class Missing:
    """A framework that was asked for by name and is not there: using it fails the test."""

    def __init__(self, name, error):
        self.name, self.error = name, error
        self.writable = True

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        pytest.fail(f"CUPY_PAGED_TEST_FRAMEWORKS names {self.name}, but: {self.error}")


def needed(package):
    """Skips the test where a package is not installed, and fails it where it was asked for."""
    if importlib.util.find_spec(package) is not None:
        return
    if package in REQUIRED:
        pytest.fail(f"CUPY_PAGED_TEST_FRAMEWORKS names {package}, which is not installed")
    pytest.skip(f"{package} is not installed: pip install {package}")


def _numpy_dtype(name):
    ml_dtypes = importlib.import_module("ml_dtypes")
    return getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name


def only(name, adapters):
    """The adapters of one framework; without it, a parameter that skips the test and says why."""
    reason = f'{name} is missing, or has no such device: pip install -e ".[interop]" installs it'
    missing = pytest.param(None, id=name, marks=pytest.mark.skip(reason=reason))
    return [arrays for arrays in adapters if arrays.name == name] or [missing]


def writable(adapters):
    """Those whose arrays an operator may write."""
    return [arrays for arrays in adapters if arrays.writable]


def present(makers):
    """What the makers make, without those whose import fails; named ones are `Missing` then."""
    for name, make in makers.items():
        try:
            yield make()
        except ImportError as error:
            if name in REQUIRED:
                yield Missing(name, error)


@functools.cache
def host():
    """The adapters of host arrays; NumPy first."""
    return list(present({"numpy": NumPy, "torch": lambda: Torch("cpu"), "jax": lambda: Jax("cpu")}))


@functools.cache
def device(index=0):
    """The adapters of arrays on a GPU; CuPy, which the library needs, first."""
    return [
        CuPy(index),
        *present({"torch": lambda: Torch(f"cuda:{index}"), "jax": lambda: Jax("cuda", index)}),
    ]
