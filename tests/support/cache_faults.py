"""What may have become of an entry of the kernel cache, and folders that are no good for one."""

import os
import random
import shutil
from pathlib import Path

ENTRIES = "cupy_paged-*.bin"


def _flip(at):
    def damage(entry: Path, other: Path) -> None:
        data = bytearray(entry.read_bytes())
        data[int(at * (len(data) - 1))] ^= 1 << 3
        entry.write_bytes(data)

    return damage


def _cut(keep):
    def damage(entry: Path, other: Path) -> None:
        data = entry.read_bytes()
        entry.write_bytes(data[: keep(len(data))])

    return damage


def _random_bytes(entry: Path, other: Path) -> None:
    entry.write_bytes(random.Random(0).randbytes(entry.stat().st_size))


def _swap(entry: Path, other: Path) -> None:
    data = entry.read_bytes()
    shutil.copyfile(other, entry)
    other.write_bytes(data)


def _entry_of_cupy(entry: Path, other: Path) -> None:
    """As CuPy 14.2 writes it, which a mistaken rename might put here."""
    from cupy.cuda import compiler
    from cupy.cuda._compiler_cache import DiskKernelCacheBackend

    _, _, image = entry.read_bytes()[32:].partition(b"\0")
    payload = compiler._encode_cache_payload(["_Z6kernelv"], image)
    DiskKernelCacheBackend(str(entry.parent)).save(entry.name, payload, "")


def _link_to_itself(entry: Path, other: Path) -> None:
    entry.unlink()
    entry.symlink_to(entry)


def _link_to_nothing(entry: Path, other: Path) -> None:
    entry.unlink()
    entry.symlink_to(entry.with_suffix(".gone"))


DAMAGES = {
    "deleted": lambda entry, other: entry.unlink(),
    "empty": _cut(lambda size: 0),
    "its digest alone": _cut(lambda size: 32),
    "half": _cut(lambda size: size // 2),
    "one byte short": _cut(lambda size: size - 1),
    "one byte long": lambda entry, other: entry.write_bytes(entry.read_bytes() + b"\0"),
    "a bit of its digest flipped": _flip(0),
    "a bit of its code flipped": _flip(0.6),
    "its last bit flipped": _flip(1),
    "random bytes": _random_bytes,
    "swapped with another kernel": _swap,
    "an entry of CuPy": _entry_of_cupy,
    "a link to itself": _link_to_itself,
    "a link to nothing": _link_to_nothing,
}
"""By name: what changes an entry, given another one beside it. All of it can be mended."""


def unwritable(folder: Path) -> Path:
    """A folder that exists and takes no file, whoever asks: permissions do not bind root."""
    if os.geteuid() == 0:
        return Path("/sys")
    folder.chmod(0o555)
    return folder


def a_file(folder: Path) -> Path:
    found = folder / "file"
    found.write_bytes(b"")
    return found


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "cache"


USELESS_FOLDERS = {"read-only": unwritable, "a file": a_file, "below a file": below_a_file}
"""By name: what makes, in an empty folder, a path that CUPY_CACHE_DIR may name in vain."""
