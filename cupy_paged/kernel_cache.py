"""Compiled kernels on disk, in CuPy's folder: never needed, and never believed.

An entry begins with a digest over its name and all that follows. One that was cut short, changed or
put in the place of another is compiled anew and replaced. What the folder refuses is said once, and
the kernels of the process live in its memory.

There are no locks. Processes that start together on an empty folder compile side by side: where
each has a core, that takes as long as to wait for the first of them. The last to finish replaces
files that are as good as its own. A lock would save the processor some work, and could itself be
what a process waits for: on file systems that have none, or after its owner was stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("cupy_paged")

FOLDER_VARIABLE = "CUPY_CACHE_DIR"
IN_MEMORY_VARIABLE = "CUPY_CACHE_IN_MEMORY"
"""CuPy's own. CuPy, too, asks for it at each compilation."""

FORMAT = "1"
"""Of entries. A part of every key, so that another one meets none of these."""
_DIGEST = hashlib.sha256
_reports = itertools.count()


class Binary(NamedTuple):
    """A compiled kernel."""

    symbol: str  # the kernel's name in it
    image: bytes  # a cubin, or PTX


def folder() -> Path:
    """Where compiled kernels are kept, of CuPy and of this library.

    Raises OSError if nobody knows: nothing is set, and the user has no home directory.
    """
    found = os.path.expanduser(os.environ.get(FOLDER_VARIABLE) or "~/.cupy/kernel_cache")
    if found.startswith("~"):
        raise OSError("the home directory is unknown")
    return Path(found)


def is_in_memory() -> bool:
    """Whether nothing is to be read from disk or written there. `find` and `keep` do not ask."""
    return os.environ.get(IN_MEMORY_VARIABLE) == "1"


def find(key: str) -> Binary | None:
    """The binary that was kept under a key. None if there is none that is whole."""
    try:
        path = _path(key)
        entry = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _report(error)
        return None
    size = _DIGEST().digest_size
    digest, contents = entry[:size], entry[size:]
    if digest != _digest(key, contents):
        logger.warning("%s is damaged: its kernel is compiled again", path)
        return None
    symbol, _, image = contents.partition(b"\0")
    return Binary(symbol.decode(), image)


def keep(key: str, binary: Binary) -> None:
    """Keeps a binary under a key, in place of what was there, for later processes."""
    contents = binary.symbol.encode() + b"\0" + binary.image
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, _digest(key, contents) + contents)
    except OSError as error:
        # Windows replaces no file that another process has open: it may be as good.
        if find(key) is None:
            _report(error)


@contextlib.contextmanager
def lets_cupy_in() -> Iterator[None]:
    """Inside of it CuPy can be imported, also where it cannot make the folder that it insists on.

    There CuPy will compile in memory, as this library does.
    """
    if "cupy" in sys.modules:
        yield
        return
    try:
        made = folder()
        made.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not is_in_memory():
            _report(error)
        os.environ[IN_MEMORY_VARIABLE] = "1"
        made = Path(__file__).parent  # any that exists: nothing is written there
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(made)
    try:
        yield
    finally:
        if before is None:
            del os.environ[FOLDER_VARIABLE]
        else:
            os.environ[FOLDER_VARIABLE] = before


def _path(key: str) -> Path:
    return folder() / f"cupy_paged-{key}.bin"


def _digest(key: str, contents: bytes) -> bytes:
    return _DIGEST(key.encode() + b"\0" + contents).digest()


def _replace(path: Path, entry: bytes) -> None:
    """Readers and other writers meet the old file or the new one, whole."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(entry)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # it is gone where all went well
            temporary.unlink()


def _report(error: OSError) -> None:
    """Says once in a process why the folder is of no use."""
    if next(_reports) == 0:
        logger.warning(
            "compiled kernels cannot be kept (%s): each process compiles them again; "
            "set %s to a folder that it can read and write",
            error,
            FOLDER_VARIABLE,
        )
