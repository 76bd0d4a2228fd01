"""Which array library runs the model, and on what."""

from __future__ import annotations

import os
import platform
from typing import Any

import numpy as np

BACKENDS = ("auto", "cupy", "numpy")


def array_module(name: str = "auto") -> Any:
    """`cupy` or `numpy`; "auto" takes CuPy where it is installed and sees a device."""
    if name == "numpy":
        return np
    try:
        import cupy

        if not cupy.cuda.runtime.getDeviceCount():
            raise RuntimeError("CuPy sees no CUDA device")
    except Exception as error:  # CuPy: ImportError, a CUDA error, or OSError for its cache folder
        if name == "auto":
            return np
        raise RuntimeError(
            f"backend cupy: {error}. `python -m cupy_paged info` says what is missing; "
            "--backend numpy runs anywhere"
        ) from error
    try:
        cupy.ones((2, 2)) @ cupy.ones((2, 2))
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"backend cupy: {error}. Matrix products need cuBLAS: pip install nvidia-cublas-cu12 "
            "(CUDA 12) or nvidia-cublas (CUDA 13); --backend numpy runs anywhere"
        ) from error
    return cupy


def finish(xp: Any) -> None:
    """Waits for the device, before a clock is read."""
    if xp is not np:
        xp.cuda.get_current_stream().synchronize()


def describe(xp: Any) -> str:
    if xp is np:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"numpy {np.__version__}, {platform.machine()} CPU, {cores} cores"
    device = xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)
    return f"cupy {xp.__version__}, {device['name'].decode()}"
