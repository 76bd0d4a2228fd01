"""Whether this machine can run kernels."""

import functools


@functools.cache
def missing() -> str | None:
    """Why CuPy has no CUDA device here. None if it has one."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if count else "CuPy sees no CUDA device"
