"""Parameters as one C struct, and the launch of a loaded kernel with it."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from cupy_paged import gpu
from cupy_paged.arrays import Array
from cupy_paged.compiler import Kernel, load

_FORMATS = {"pointer": "P", "int64": "q", "int": "i", "float": "f"}


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
        self._dtype = np.dtype([("bytes", np.uint8, self._struct.size)])

    @property
    def size(self) -> int:
        return self._struct.size

    def pack(self, values: Mapping[str, Any]) -> np.void:
        """The struct, by value; every field must be given."""
        packed = self._struct.pack(*[values[name] for name in self.fields])
        return np.frombuffer(packed, self._dtype)[0]


def scale_fields(name: str, scale: float | Array) -> dict[str, Any]:
    """Fields of a scale that is a number, or is read on the device from a one-element array."""
    if isinstance(scale, Array):
        return {f"{name}_array": scale.pointer, name: 1.0}
    return {f"{name}_array": 0, name: scale}


def cache_strides(name: str, strides: tuple[int, int, int]) -> dict[str, int]:
    """Fields of a `CacheStrides`."""
    return {f"{name}.{dim}": s for dim, s in zip(("block", "head", "token"), strides, strict=True)}


def launch(
    kernel: Kernel, device: int, stream: int, work: int, params: np.void, resident: bool = False
) -> None:
    """Queues a kernel on a stream, one thread block for each piece of work.

    resident    the kernel takes any grid: no more thread blocks than the device holds at once
    """
    loaded = load(kernel, device, stream)
    blocks = min(work, loaded.max_blocks) if resident else work
    with gpu.cupy().cuda.Device(device):
        loaded.function(
            (blocks, 1, 1),
            (kernel.num_threads, 1, 1),
            (params,),
            kernel.shared_bytes,
            gpu.external_stream(stream, device),
        )
