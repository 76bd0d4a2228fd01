"""A specialisation of a kernel -> a function ready to launch.

The only file that knows NVRTC and CuPy's kernel cache. CuPy keys its cache by source text, options
and names, and does not look into included files: a kernel is handed over as one text with its
includes resolved, so that a changed header can never meet an old binary.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cupy_paged import gpu

logger = logging.getLogger("cupy_paged")

_INCLUDE = re.compile(r'#include "([^"]+)"')


@functools.cache
def kernel_dir() -> Path:
    """Folder of the CUDA sources: inside an installed package, beside the package in a checkout.

    Raises FileNotFoundError if neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "paged_attention.cu").is_file():
            return folder
    raise FileNotFoundError(
        f"cupy_paged: no CUDA sources in {package / 'kernels'} or {package.parent / 'kernels'}; "
        "the installation is incomplete: pip install --force-reinstall cupy-paged"
    )


@functools.cache
def flatten(filename: str) -> str:
    """Text of a file in `kernels/`, every include of our own replaced by its text once."""
    seen: set[str] = set()

    def text_of(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (kernel_dir() / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda include: text_of(include[1]), text)

    return text_of(filename)


def sources_digest() -> str:
    """SHA-256 over all CUDA sources, in hex."""
    digest = hashlib.sha256()
    for path in sorted(kernel_dir().glob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Kernel(NamedTuple):
    """One specialisation of one `__global__` template, and the shape of its thread blocks."""

    source: str  # file in kernels/
    name: str  # C++ name expression
    num_threads: int
    shared_bytes: int = 0  # dynamic shared memory


def template(name: str, *arguments: Any) -> str:
    """Spells a template of the namespace: types by their name, sizes as they are."""
    spelled = (a if isinstance(a, str) else str(int(a)) for a in arguments)
    return f"cupy_paged::{name}<{', '.join(spelled)}>"


def cpp(dtype: str) -> str:
    """The C++ type of a dtype name."""
    return f"cupy_paged::{dtype}"


def options(sm: int | None = None) -> tuple[str, ...]:
    """NVRTC options; with `sm`, the code paths of that compute capability on whatever chip."""
    emulation = () if sm is None else (f"-DCUPY_PAGED_SM={sm}",)
    return ("--std=c++17", *emulation)


class Loaded(NamedTuple):
    """A kernel on one device."""

    function: Any  # cupy.cuda.Function
    kernel: Kernel
    max_blocks: int  # thread blocks that the device can hold at once


_lock = threading.Lock()
_loaded: dict[tuple[Kernel, int, int | None], Loaded] = {}


class _Captures(threading.local):
    are_thread_local = False


_captures = _Captures()


@contextlib.contextmanager
def loading_beside_captures() -> Iterator[None]:
    """Loads what a capture is the first to need on another thread, instead of refusing to.

    For captures that restrict their own thread alone: those of CUDA's thread-local mode.
    """
    _captures.are_thread_local = True
    try:
        yield
    finally:
        _captures.are_thread_local = False


def load(kernel: Kernel, device: int, stream: int) -> Loaded:
    """The kernel on a device, compiled if neither this process nor CuPy's disk cache has it.

    A compilation takes about a second. Raises RuntimeError where `stream` is being captured into a
    CUDA graph and the kernel was never used before: loading it would break the capture, but for
    `loading_beside_captures`.
    """
    key = (kernel, device, gpu.emulated_sm())
    found = _loaded.get(key)
    if found is None:
        if not gpu.is_capturing(device, stream):
            found = _load_once(*key)
        elif _captures.are_thread_local:
            with ThreadPoolExecutor(1) as beside:
                found = beside.submit(_load_once, *key).result()
        else:
            raise RuntimeError(
                f"{kernel.name} is used for the first time inside a CUDA graph capture, where it "
                "cannot be compiled: call the op once with the same shapes and dtypes before"
            )
    return found


def is_loaded(kernel: Kernel, device: int) -> bool:
    """Whether `load` would find the kernel at once, also while a CUDA graph is being captured."""
    return (kernel, device, gpu.emulated_sm()) in _loaded


def _load_once(kernel: Kernel, device: int, sm: int | None) -> Loaded:
    key = (kernel, device, sm)
    with _lock:
        found = _loaded.get(key)
        if found is None:
            found = _loaded[key] = _load(*key)
    return found


def _load(kernel: Kernel, device: int, sm: int | None) -> Loaded:
    cupy = gpu.cupy()
    start = time.perf_counter()
    with gpu.on(device):
        module = cupy.RawModule(
            code=flatten(kernel.source), options=options(sm), name_expressions=(kernel.name,)
        )
        raw = module.get_function(kernel.name)
        if kernel.shared_bytes:
            raw.max_dynamic_shared_size_bytes = kernel.shared_bytes
        function = raw.kernel
        blocks = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            function.ptr, kernel.num_threads, kernel.shared_bytes
        )
    logger.info("%s ready on cuda:%d in %.2f s", kernel.name, device, time.perf_counter() - start)
    return Loaded(function, kernel, blocks * gpu.device_limits(device).num_multiprocessors)
