"""What this machine has of what the GPU kernels need, and the command that mends what is missing.

Needs NumPy alone. Driver and devices are read from the driver's own library, so that they show
even where CuPy is absent or cannot be imported.
"""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cupy_paged import __version__, kernel_cache
from cupy_paged.compiler import kernel_dir, sources_digest
from cupy_paged.driver import devices, driver_cuda_version, driver_version
from cupy_paged.requirements import (
    CUPY_WHEELS,
    OLDEST_CUPY,
    REQUIREMENTS,
    driver_remedy,
    installed_version,
    installed_wheels,
    is_too_old,
    major_of,
    remedy,
)

OLDEST_COMPUTE_CAPABILITY = (7, 5)

FRAMEWORKS = ("numpy", "ml_dtypes", "torch", "jax")


class Problem(NamedTuple):
    what: str
    remedy: str
    is_fatal: bool = True  # without it, no kernel runs


class Report(NamedTuple):
    rows: list[tuple[str, str]]
    problems: list[Problem]

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows) + 2
        lines = [f"{label:<{width}}{value}" for label, value in self.rows]
        lines.append("")
        if any(problem.is_fatal for problem in self.problems):
            lines.append("GPU kernels: not available. Host arrays run on the NumPy backend.")
        else:
            lines.append("GPU kernels: ready.")
        for problem in self.problems:
            lines += [f"  missing: {problem.what}", f"    mend:  {problem.remedy}"]
        return "\n".join(lines)


def nvrtc_version() -> str | None:
    """The version of the NVRTC that CuPy loads, such as "12.9"."""
    try:
        from cupy.cuda import nvrtc

        major, minor = nvrtc.getVersion()
    except Exception:
        return None
    return f"{major}.{minor}"


def framework_versions() -> dict[str, str | None]:
    """Versions of CuPy, NumPy, torch, JAX and ml_dtypes, without importing any of them."""
    cupy = next(filter(None, map(installed_version, CUPY_WHEELS)), None)
    return {"cupy": cupy, **{name: installed_version(name) for name in FRAMEWORKS}}


def header_dir() -> Path | None:
    """The folder of cuda_fp16.h, which CuPy's own elementwise kernels include."""
    candidates: list[str | None] = []
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        candidates.append(find_nvidia_header_directory("cudart"))
    except Exception:
        # Without CuPy there is no pathfinder; a broken one is no reason to stop a report.
        pass
    if "CUDA_PATH" in os.environ:
        candidates.append(os.path.join(os.environ["CUDA_PATH"], "include"))
    for candidate in filter(None, candidates):
        if (Path(candidate) / "cuda_fp16.h").is_file():
            return Path(candidate)
    return None


def _describe_sources(problems: list[Problem]) -> str:
    count = len(list(kernel_dir().glob("*.cu*")))
    return f"{kernel_dir()} ({count} files, sha256 {sources_digest()[:12]})"


def _describe_cupy(problems: list[Problem]) -> str:
    wheels = installed_wheels()
    if len(wheels) > 1:
        problems.append(
            Problem(f"one CuPy: {' and '.join(wheels)} are installed together", remedy())
        )
    try:
        with kernel_cache.lets_cupy_in():
            import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise
        problems.append(Problem("CuPy", remedy()))
        return "not installed"
    if is_too_old(cupy.__version__):
        problems.append(
            Problem(f"CuPy {OLDEST_CUPY} or newer (found {cupy.__version__})", remedy())
        )
    return f"{cupy.__version__} ({', '.join(wheels) or 'not from a known wheel'})"


def _describe_nvrtc(problems: list[Problem]) -> str:
    version = nvrtc_version()
    if version is None:
        if "cupy" in sys.modules:
            problems.append(Problem("NVRTC", remedy()))
        return "not found"
    return version


def _describe_headers(problems: list[Problem]) -> str:
    folder = header_dir()
    if folder is None:
        if "cupy" in sys.modules:
            problems.append(Problem("CUDA's headers, which CuPy needs", remedy()))
        return "not found"
    return str(folder)


def _describe_cache(problems: list[Problem]) -> str:
    try:
        folder = kernel_cache.folder()
        is_there = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    except OSError as error:
        folder, is_there, is_usable = error, False, False
    else:
        # An import of CuPy has made it, if that could be done.
        is_usable = os.access(folder, os.W_OK) if is_there else "cupy" not in sys.modules
    if not is_usable:
        what = f"a kernel cache that can be written ({folder}), so each process compiles again"
        if is_there:
            what += " what is not in it"
        problems.append(Problem(what, "export CUPY_CACHE_DIR=FOLDER", is_fatal=False))
    if kernel_cache.is_in_memory():
        return f"none: {kernel_cache.IN_MEMORY_VARIABLE} is set"
    if not is_usable and not is_there:
        return "none"
    sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()]
    return f"{folder} ({len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB)"


def _describe_driver(problems: list[Problem]) -> str:
    cuda = driver_cuda_version()
    if cuda is None:
        problems.append(
            Problem(
                "an NVIDIA driver",
                "install the driver of this machine's GPU (https://www.nvidia.com/drivers); "
                "in a container, start it with --gpus all",
            )
        )
        return "not found"
    oldest, nvrtc = min(REQUIREMENTS), nvrtc_version()
    needs = {f"CUDA {oldest}": oldest}
    needs |= {wheel: CUPY_WHEELS[wheel] or oldest for wheel in installed_wheels()}
    if nvrtc:
        needs[f"NVRTC {nvrtc}"] = major_of(nvrtc)
    too_new = [what for what, major in needs.items() if major > major_of(cuda)]
    if too_new:
        problems.append(
            Problem(
                f"a driver for {' and '.join(too_new)} (this one runs CUDA {cuda})",
                driver_remedy(max(needs.values())),
            )
        )
    return f"{driver_version() or 'unknown version'} (runs CUDA up to {cuda})"


def _describe_devices(problems: list[Problem]) -> str:
    found = devices()
    usable = [device for device in found if device.compute_capability >= OLDEST_COMPUTE_CAPABILITY]
    if not found and driver_cuda_version() is not None:
        problems.append(
            Problem("a CUDA device", "check nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set")
        )
    elif found and not usable:
        oldest = "sm_{}{}".format(*OLDEST_COMPUTE_CAPABILITY)
        problems.append(Problem(f"a device of {oldest} or newer", "use another GPU"))
    return "; ".join(f"{device.ordinal}: {device}" for device in found) or "none"


def inspect() -> Report:
    """Everything that `python -m cupy_paged info` prints. A part that fails says so in its row."""
    problems: list[Problem] = []
    rows = [
        ("cupy-paged", f"{__version__} ({Path(__file__).parent})"),
        ("Python", f"{platform.python_version()} ({platform.platform()})"),
    ]
    parts: list[tuple[str, Callable[[list[Problem]], str]]] = [
        ("kernels", _describe_sources),
        ("CuPy", _describe_cupy),
        ("NVRTC", _describe_nvrtc),
        ("CUDA headers", _describe_headers),
        ("kernel cache", _describe_cache),
        ("driver", _describe_driver),
        ("devices", _describe_devices),
    ]
    for label, describe in parts:
        try:
            value = describe(problems)
        except Exception as error:
            value = f"{type(error).__name__}: {error}".splitlines()[0]
            problems.append(Problem(f"{label} ({value})", remedy()))
        rows.append((label, value))
    versions = framework_versions()
    rows += [(name, versions[name] or "not installed") for name in FRAMEWORKS]
    return Report(rows, problems)


def run(arguments: argparse.Namespace) -> int:
    print(inspect())
    return 0


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "info",
        help="devices, CuPy, NVRTC, driver, header and cache paths, and what is missing",
        description=__doc__,
    )
    parser.set_defaults(run=run)
