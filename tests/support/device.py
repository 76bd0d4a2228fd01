"""Whether this machine can run kernels, and tests that need several devices."""

import functools

DEVICES_NEEDED = {"tests/gpu/test_devices.py": 2}
"""Test files that one CUDA device is not enough for."""


@functools.cache
def missing(needed: int = 1) -> str | None:
    """Why CuPy has not so many CUDA devices here. None if it has."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if count >= needed:
        return None
    return f"CuPy sees {count} of {needed} CUDA devices" if count else "CuPy sees no CUDA device"


def name() -> str:
    """Of the first CUDA device, or "CPU"."""
    if missing():
        return "CPU"
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()


def left_out() -> dict[str, str]:
    """Test files that need more devices than this machine has, and why."""
    reasons = {path: missing(needed) for path, needed in DEVICES_NEEDED.items()}
    return {path: reason for path, reason in reasons.items() if reason is not None}
