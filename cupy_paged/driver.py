"""What NVIDIA's driver says of itself and its devices, asked through its own libraries.

So it is known even where CuPy is absent or cannot be imported.
"""

import ctypes
import functools
import sys
from typing import NamedTuple

_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
_MULTIPROCESSOR_COUNT = 16


class Device(NamedTuple):
    ordinal: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    sm_count: int

    def __str__(self) -> str:
        major, minor = self.compute_capability
        gib = self.memory_bytes / 2**30
        return f"{self.name}, sm_{major}{minor}, {gib:.1f} GiB, {self.sm_count} SMs"


@functools.cache
def _load(*names: str) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def cuda_driver() -> ctypes.CDLL | None:
    """The driver's library. None where there is no driver."""
    return _load("nvcuda.dll") if sys.platform == "win32" else _load("libcuda.so.1")


def driver_cuda_version() -> str | None:
    """The newest CUDA version that the driver runs, such as "13.0". None without a driver."""
    driver = cuda_driver()
    version = ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def driver_version() -> str | None:
    """The driver's own version, such as "580.95.05"."""
    nvml = _load("nvml.dll") if sys.platform == "win32" else _load("libnvidia-ml.so.1")
    if nvml is None or nvml.nvmlInit_v2():
        return None
    version = ctypes.create_string_buffer(80)
    failed = nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(len(version)))
    nvml.nvmlShutdown()
    return None if failed else version.value.decode()


def devices() -> list[Device]:
    """The CUDA devices that this process may use."""
    driver = cuda_driver()
    count = ctypes.c_int()
    if driver is None or driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []

    def attribute(device: ctypes.c_int, number: int) -> int:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    found = []
    for ordinal in range(count.value):
        device = ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        memory = ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        capability = (
            attribute(device, _COMPUTE_CAPABILITY_MAJOR),
            attribute(device, _COMPUTE_CAPABILITY_MINOR),
        )
        sm_count = attribute(device, _MULTIPROCESSOR_COUNT)
        found.append(Device(ordinal, name.value.decode(), capability, memory.value, sm_count))
    return found
