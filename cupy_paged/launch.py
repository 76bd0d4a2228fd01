"""Parameters as one C struct, and the launch of a loaded kernel with it."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import Array
from cupy_paged.compiler import Kernel, load

_FORMATS = {"pointer": "P", "int64": "q", "int": "i", "float": "f"}
_ADDRESS = struct.Struct("@P")


class Params:
    """A packed struct in memory of its own, behind a list of one address: what a launch takes."""

    __slots__ = ("address", "memory")

    def __init__(self, packed: bytes) -> None:
        self.memory = ctypes.create_string_buffer(_ADDRESS.size + len(packed))
        self.address = ctypes.addressof(self.memory)
        _ADDRESS.pack_into(self.memory, 0, self.address + _ADDRESS.size)
        # To assign to a slice of a ctypes array would go byte by byte.
        ctypes.memmove(self.address + _ADDRESS.size, packed, len(packed))


class ParamTemplate:
    """A struct of which all is known but its pointers."""

    def __init__(self, packed: bytes, pointers: struct.Struct) -> None:
        self._packed, self._pointers = packed, pointers
        self._idle: list[Params] = []

    def queue(self, launches: Iterable[Launch], stream: int, pointers: Iterable[int]) -> None:
        """Queues kernels of the current device with all the pointers, in order."""
        try:
            # One step for all threads, and for whatever interrupts this one.
            params = self._idle.pop()
        except IndexError:
            params = Params(self._packed)
        self._pointers.pack_into(params.memory, _ADDRESS.size, *pointers)
        for _, start in launches:
            start(stream, params.address, 0)
        self._idle.append(params)  # a launch has copied them


class ParamStruct:
    """The fields of a C++ struct, in order: 8-byte fields first, so that nothing is padded between.

    declaration    lines of a kind ("pointer", "int64", "int", "float") and the fields of that kind
    """

    def __init__(self, cpp_name: str, declaration: str) -> None:
        self.cpp_name = cpp_name
        lines = [line.split() for line in declaration.strip().splitlines()]
        self.fields = {field: kind for kind, *fields in lines for field in fields}
        codes = "".join(_FORMATS[kind] for kind in self.fields.values())
        self._struct = struct.Struct(f"@{codes}0q")
        self.pointers = [field for field, kind in self.fields.items() if kind == "pointer"]
        self._pointers = struct.Struct(f"@{len(self.pointers)}P")

    @property
    def size(self) -> int:
        return self._struct.size

    def pack(self, values: Mapping[str, Any]) -> Params:
        """The struct; every field must be given."""
        return Params(self._packed(values))

    def pack_in_order(self, values: Sequence[int | float]) -> Params:
        """The struct from the values of all fields in their order, for structs of hundreds."""
        return Params(self._struct.pack(*values))

    def pack_with(self, values: Sequence[int | float], rest: np.ndarray) -> Params:
        """The struct from the values of the first fields, and an array for some of the others.

        Fields that neither has are zeros.
        """
        head = struct.Struct("@" + self._struct.format[1 : 1 + len(values)])
        packed = head.pack(*values) + rest.tobytes()
        assert len(packed) <= self.size, f"{self.cpp_name} has no room for {rest.shape}"
        return Params(packed.ljust(self.size, b"\0"))

    def template(self, values: Mapping[str, Any]) -> ParamTemplate:
        """The struct without its pointers, which come first; every other field must be given."""
        assert [*self.fields][: len(self.pointers)] == self.pointers
        return ParamTemplate(
            self._packed({**values, **dict.fromkeys(self.pointers, 0)}), self._pointers
        )

    def _packed(self, values: Mapping[str, Any]) -> bytes:
        return self._struct.pack(*[values[name] for name in self.fields])


def scale_fields(name: str, scale: float | Array) -> dict[str, Any]:
    """Fields of a scale that is a number, or is read on the device from a one-element array."""
    if isinstance(scale, Array):
        return {f"{name}_array": scale.pointer, name: 1.0}
    return {f"{name}_array": 0, name: scale}


def cache_strides(name: str, strides: tuple[int, int, int]) -> dict[str, int]:
    """Fields of a `CacheStrides`."""
    return {f"{name}.{dim}": s for dim, s in zip(("block", "head", "token"), strides, strict=True)}


class Launch(NamedTuple):
    """A kernel of one device, and how many thread blocks of it."""

    function: Any  # cupy.cuda.Function, which keeps the kernel loaded
    start: Callable[[int, int, int], None]  # on a stream, with an address of parameters, and 0


def prepare(kernel: Kernel, device: int, stream: int, work: int, resident: bool = False) -> Launch:
    """A launch of one thread block for each piece of work; `stream` is the first that it is for.

    resident    the kernel takes any grid: no more thread blocks than the device holds at once
    """
    loaded = load(kernel, device, stream)
    blocks = max(min(work, loaded.max_blocks) if resident else work, 1)
    # CuPy's Function takes arguments of all kinds, which costs more than the launch itself.
    start = functools.partial(
        gpu.cupy().cuda.driver.launchKernel,
        loaded.function.ptr, blocks, 1, 1, kernel.num_threads, 1, 1, kernel.shared_bytes,
    )  # fmt: skip
    return Launch(loaded.function, start)


def launch(
    kernel: Kernel, device: int, stream: int, work: int, params: Params, resident: bool = False
) -> None:
    """Queues a kernel on a stream; the arguments are those of `prepare`."""
    _, start = prepare(kernel, device, stream, work, resident)
    with gpu.on(device):
        start(stream, params.address, 0)
