"""What GPU arrays need beside NumPy, and what brings it to this machine.

Commands name packages, not an extra of this one: so they work in a checkout, too. They quote with
double quotes, which every shell takes. CuPy may be absent or broken, and is not imported. What only
messages need is imported for them: with it, this package would take a tenth longer to import.
"""

import re

from cupy_paged.driver import driver_cuda_version

# What the extras of pyproject.toml install, by CUDA major. The first of each is its CuPy.
REQUIREMENTS = {
    12: (
        "cupy-cuda12x>=14.2",
        "nvidia-cuda-nvrtc-cu12>=12.8",
        "nvidia-cuda-runtime-cu12>=12.8",
        "ml_dtypes",
    ),
    13: ("cupy-cuda13x>=14.2", "nvidia-cuda-nvrtc>=13", "nvidia-cuda-runtime>=13", "ml_dtypes"),
}
OLDEST_DRIVERS = {12: "525.60 or newer, on Windows 528.33", 13: "580 or newer"}
"""The drivers that run every minor version of a CUDA major.

Source: release notes of the CUDA toolkit, minor version compatibility.
"""
CUPY_WHEELS = {"cupy": None, "cupy-cuda11x": 11, "cupy-cuda12x": 12, "cupy-cuda13x": 13}
"""CuPy under each of its names: the CUDA major that it is for, None where it was built here."""
OLDEST_CUPY = "14.2"

_RELEASE = re.compile(r"v?(\d+(?:\.\d+)*)[-_.]?(a|b|c|rc|pre|dev)?", re.IGNORECASE)


# ---- what is here ----


def installed_version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_wheels() -> list[str]:
    """The names under which CuPy is installed. Two are one too many: they share a folder."""
    return [wheel for wheel in CUPY_WHEELS if installed_version(wheel)]


def is_too_old(cupy_version: str) -> bool:
    """Whether a version of CuPy, such as "13.6.0", is older than what kernels need.

    As pip orders them: "14.2rc1" and "14.2.0.dev1" are older than 14.2, "14.2.post1" is not.
    """
    return _order(cupy_version) < _order(OLDEST_CUPY)


def major_of(version: str) -> int:
    """The first number of a version, such as 13 of "13.0"."""
    return int(version.split(".")[0])


def _order(version: str) -> tuple[list[int], bool]:
    """What versions are compared by: their numbers, then whether they are final."""
    release, before = _RELEASE.match(version).groups()
    numbers = [int(number) for number in release.split(".")]
    while numbers[-1:] == [0]:
        numbers.pop()
    return numbers, before is None


# ---- what to do ----


def install_command() -> str:
    """What installs all that fits this machine, in the place of every CuPy that does not."""
    major, here = _fitting_major(), installed_wheels()
    requirements = [f'"{requirement}"' for requirement in REQUIREMENTS[major]]
    wrong = [wheel for wheel in here if CUPY_WHEELS[wheel] != major]
    steps = [f"pip uninstall -y {' '.join(wrong)}"] if wrong else []
    if 0 < len(wrong) < len(here):  # the uninstalled one took files of the right one with it
        steps.append(f"pip install --force-reinstall --no-deps {requirements[0]}")
    return " && ".join([*steps, f"pip install {' '.join(requirements)}"])


def remedy() -> str:
    """What brings this machine all that GPU arrays need: a command, after a driver if need be."""
    if not _driver_is_hopeless():
        return install_command()
    return (
        f"the driver is too old, it runs CUDA {driver_cuda_version()} at most; "
        f"{_newer_driver(_fitting_major())}, then {install_command()}"
    )


def driver_remedy(cuda_major: int) -> str:
    """What helps where the driver is too old for a CUDA major: a newer one, or a CuPy that fits."""
    newer = _newer_driver(cuda_major)
    return newer if _driver_is_hopeless() else f"{newer}, or {install_command()}"


def _newer_driver(cuda_major: int) -> str:
    where = OLDEST_DRIVERS.get(cuda_major, "https://www.nvidia.com/drivers")
    return f"install a driver for CUDA {cuda_major} ({where})"


def _driver_is_hopeless() -> bool:
    """Whether there is a driver, and it is too old for every CuPy that would do."""
    newest = driver_cuda_version()
    return newest is not None and major_of(newest) < min(REQUIREMENTS)


def _fitting_major() -> int:
    """That of the CuPy that is here, else the newest for the driver, else torch's, else 12.

    A CuPy that the driver is too old for does not count, unless the driver is too old for all.
    """
    newest = major_of(driver_cuda_version() or _torch_cuda_version() or "12")
    fitting = set(REQUIREMENTS)
    if driver_cuda_version() is not None and not _driver_is_hopeless():
        fitting = {major for major in fitting if major <= newest}
    fitting = fitting.intersection(map(CUPY_WHEELS.get, installed_wheels())) or fitting
    return max((major for major in fitting if major <= newest), default=min(fitting))


def _torch_cuda_version() -> str | None:
    """The CUDA version that torch is built for. None if it is absent, broken or for the CPU alone.

    Read from a file that torch's build writes: to import torch takes seconds.
    """
    import importlib.metadata
    import runpy

    try:
        file = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        version = runpy.run_path(str(file))["cuda"]
        return version if major_of(version) else None
    except Exception:  # the file is code, and not ours
        return None
