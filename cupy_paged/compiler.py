"""A specialisation of a kernel -> a function ready to launch.

The only file that knows NVRTC. A kernel is one text with its includes resolved, and its binary is
kept under a digest of that text, so that a changed header can never meet an old binary. CuPy's own
way to compile fails where its cache cannot be read or written, and believes an entry of another
kernel.
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

from cupy_paged import gpu, kernel_cache
from cupy_paged.driver import driver_cuda_version
from cupy_paged.kernel_cache import Binary
from cupy_paged.requirements import install_command

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
    return ("--std=c++17", "-ftz=true", *emulation)


# ---- compilation ----

OLDEST_NVRTC = (12, 8)


def binary_of(kernel: Kernel, arch: int, sm: int | None) -> Binary:
    """A kernel for chips of compute capability `arch`, times ten: from disk, or compiled and kept.

    With `sm`, it has the code paths of that compute capability. Raises RuntimeError, with what to
    do about it, where NVRTC is missing, does not know the chip, or refuses the source.
    """
    source, names = flatten(kernel.source), (kernel.name,)
    settings = (target(arch), *options(sm))
    if kernel_cache.is_in_memory():
        return _compile(source, kernel.source, names, settings)
    parts = (kernel_cache.FORMAT, source, *names, *settings, _nvrtc_build())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    binary = kernel_cache.find(key)
    if binary is None:
        binary = _compile(source, kernel.source, names, settings)
        kernel_cache.keep(key, binary)
    return binary


@functools.cache
def target(arch: int) -> str:
    """NVRTC's option for machine code of a chip; for one that it does not know yet, for PTX.

    The driver makes machine code of PTX. Raises RuntimeError for a chip older than all it knows.
    """
    nvrtc = _nvrtc()
    known = nvrtc.getSupportedArchs()
    if arch in known:
        return f"-arch=sm_{arch}"
    older = [other for other in known if other < arch]
    if not older:
        raise RuntimeError(
            f"NVRTC {_version()} compiles for sm_{min(known)} and newer, this device is sm_{arch}"
        )
    logger.warning(
        "NVRTC %s does not know sm_%d and compiles for sm_%d: %s, with a newer one, if it is slow",
        _version(), arch, max(older), install_command(),
    )  # fmt: skip
    return f"-arch=compute_{max(older)}"


def _nvrtc() -> Any:
    """CuPy's module of it, which loads the library when it is first called."""
    nvrtc = gpu.cupy().cuda.nvrtc
    try:
        nvrtc.getVersion()
    except (RuntimeError, ImportError, OSError) as error:
        raise RuntimeError(
            f"NVRTC, which compiles kernels, cannot be loaded: {install_command()}"
        ) from error
    return nvrtc


def _version() -> str:
    return ".".join(map(str, _nvrtc().getVersion()))


@functools.cache
def _nvrtc_build() -> str:
    """What NVRTC says of itself in PTX: two builds of one version may compile differently."""
    newest = max(_nvrtc().getSupportedArchs())
    ptx = _compile("", "nothing.cu", (), (f"-arch=compute_{newest}",)).image.decode()
    return "\n".join(line for line in ptx.splitlines() if line.startswith("//"))


def _compile(
    source: str, filename: str, names: tuple[str, ...], settings: tuple[str, ...]
) -> Binary:
    """Machine code or PTX, as the settings ask, with the one kernel that is named, or none."""
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source, filename, (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, settings)
        symbols = [nvrtc.getLoweredName(program, name) for name in names]
        is_ptx = settings[0].startswith("-arch=compute_")
        image = nvrtc.getPTX(program) if is_ptx else nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        what = f"NVRTC {_version()} cannot compile {', '.join(names) or filename}"
        if nvrtc.getVersion() < OLDEST_NVRTC:
            oldest = ".".join(map(str, OLDEST_NVRTC))
            what += f", {oldest} or newer may: {install_command()}"
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(f"{what} ({' '.join(settings)})\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
    return Binary("".join(symbols), image)


# ---- loading ----


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
    """The kernel on a device, compiled if neither this process nor the cache on disk has it.

    A compilation takes about a second. Raises RuntimeError where NVRTC or the driver refuses the
    kernel, with what mends that, and where `stream` is being captured into a CUDA graph and the
    kernel was never used before: loading it would break the capture, but for
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
    gpu.cupy()  # refuses to work in a forked process, whose lock may be held for ever
    with _lock:
        found = _loaded.get(key)
        if found is None:
            found = _loaded[key] = _load(*key)
    return found


def _load(kernel: Kernel, device: int, sm: int | None) -> Loaded:
    cuda = gpu.cupy().cuda
    start = time.perf_counter()
    limits = gpu.device_limits(device)
    with gpu.on(device):
        symbol, image = binary_of(kernel, limits.sm, sm)
        module = cuda.Module()
        try:
            module.load(image)
        except RuntimeError as error:
            raise RuntimeError(
                f"{kernel.name}: the driver, for CUDA {driver_cuda_version()}, does not load "
                f"what NVRTC {_version()} made for cuda:{device}, sm_{limits.sm} ({error}); "
                "`python -m cupy_paged info` says whether they fit each other"
            ) from error
        function = module.get_function(symbol)
        if kernel.shared_bytes:
            attribute = cuda.driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            cuda.driver.funcSetAttribute(function.ptr, attribute, kernel.shared_bytes)
        blocks = cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            function.ptr, kernel.num_threads, kernel.shared_bytes
        )
    logger.info("%s ready on cuda:%d in %.2f s", kernel.name, device, time.perf_counter() - start)
    return Loaded(function, kernel, blocks * limits.num_multiprocessors)
