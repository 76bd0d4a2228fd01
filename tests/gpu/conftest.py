"""What every GPU test may rely on."""

import gc

import cupy
import pytest


@pytest.fixture(autouse=True)
def first_device_is_current():
    """JAX leaves the context of its own device current, also where it frees what tests left."""
    if cupy.cuda.runtime.getDeviceCount() > 1:
        gc.collect()
    cupy.cuda.runtime.setDevice(0)
