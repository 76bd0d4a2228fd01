"""A stand-in for the driver's library, which knows its version and devices without CuPy."""

from cupy_paged import driver


class FakeDriver:
    """`cuda` is its CUDA version, such as 13000; `gpus` are (name, major, minor)."""

    def __init__(self, cuda: int, gpus=(), init_error: int = 0):
        self.cuda = cuda
        self.gpus = gpus
        self.init_error = init_error

    def install(self, monkeypatch) -> None:
        monkeypatch.setattr(driver, "cuda_driver", lambda: self)

    def cuDriverGetVersion(self, version):
        version._obj.value = self.cuda
        return 0

    def cuInit(self, flags):
        return self.init_error

    def cuDeviceGetCount(self, count):
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name, length, device):
        name.value = self.gpus[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):
        memory._obj.value = 80 * 2**30
        return 0

    def cuDeviceGetAttribute(self, value, number, device):
        _, major, minor = self.gpus[device.value]
        value._obj.value = {75: major, 76: minor, 16: 132}[number]
        return 0
