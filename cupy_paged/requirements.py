"""What GPU arrays need beside NumPy, and the command that installs it.

The command names packages, not an extra of this one: so it works in a checkout, too. CuPy may be
absent or broken, and is not imported. What only messages need is imported for them: with it, this
package would take a tenth longer to import.
"""

import shlex

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
CUPY_WHEELS = {"cupy": None, "cupy-cuda12x": 12, "cupy-cuda13x": 13}
OLDEST_CUPY = "14.2"


def installed_version(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_too_old(cupy_version: str) -> bool:
    """Whether a version of CuPy, such as "13.6.0", is older than what kernels need."""
    return _first_two(cupy_version) < _first_two(OLDEST_CUPY)


def install_command(cuda_major: int | None = None) -> str:
    """What installs all that a CUDA major needs: of one that fits this machine if none is given."""
    requirements = REQUIREMENTS[cuda_major or _fitting_major()]
    return f"pip install {' '.join(map(shlex.quote, requirements))}"


def major_of(version: str) -> int:
    """The first number of a version, such as 13 of "13.0"."""
    return int(version.split(".")[0])


def _first_two(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _fitting_major() -> int:
    """That of the CuPy that is here, else the newest for the driver, else torch's, else 12."""
    for wheel, major in CUPY_WHEELS.items():
        if major and installed_version(wheel):
            return major
    version = driver_cuda_version() or _torch_cuda_version() or "12"
    return 13 if major_of(version) >= 13 else 12


def _torch_cuda_version() -> str | None:
    """The CUDA version that torch is built for. None without torch, or if it is for the CPU alone.

    Read from a file that torch's build writes: to import torch takes seconds.
    """
    import importlib.metadata
    import runpy

    try:
        file = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        return runpy.run_path(str(file)).get("cuda")
    except (importlib.metadata.PackageNotFoundError, OSError):
        return None
