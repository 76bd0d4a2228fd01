"""The machine code of a cubin. The rest has a name in it that NVRTC makes anew each time."""

import struct


def machine_code(cubin: bytes, symbol: str) -> bytes:
    """The instructions of one kernel; raises KeyError if it is not there."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, names = struct.unpack_from("<HHH", cubin, 0x3A)
    found = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(number)]
    names_at = found[names][4]
    sections = {}
    for name, _, _, _, at, length in found:
        start = names_at + name
        sections[cubin[start : cubin.index(b"\0", start)].decode()] = cubin[at : at + length]
    return sections[f".text.{symbol}"]
