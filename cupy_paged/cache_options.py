"""Where a cache is to be, what it holds and its scales, read from the arguments it is made with."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_paged import checks, gpu
from cupy_paged.arrays import Array, array, is_array, location
from cupy_paged.cache_memory import storage_dtype
from cupy_paged.dtypes import FLOATS, FP8, name_of
from cupy_paged.results import empty
from cupy_paged.streams import launch_stream

FRAMEWORKS = ("numpy", "cupy", "torch")


def leader_of(like: Any, framework: str | None, device: Any) -> Array:
    """An array of no elements where the cache is to be: beside `like`, or where the others say.

    Raises ValueError or TypeError for what says nothing, or more than once.
    """
    if like is None:
        like = _array_of(framework, device)
    elif framework is not None or device is not None:
        raise TypeError("like: says framework and device, needs to come without them")
    if not is_array(like):
        raise TypeError(f"like: got {type(like).__name__}, needs an array")
    framework, _ = location(like)
    if framework == "jax":
        raise _immutable("like")
    if framework not in FRAMEWORKS:
        raise TypeError(
            f"like: is an array by protocol alone, needs to be of {', '.join(FRAMEWORKS)}"
        )
    leader = array(like, "like")
    # Only where it is counts: the array itself may go.
    stand_in = empty(leader, "like", (0,), "uint8", launch_stream(like, None))
    return leader._replace(name="the cache", owner=stand_in.owner, bits=stand_in.bits)


def dtype_of(dtype: Any, leader: Array, framework: str | None) -> str:
    """The dtype of a cache: `dtype`, or else the leader's, unless a framework alone was named.

    Raises ValueError for what no cache can hold.
    """
    if dtype is None:
        if framework is not None or leader.dtype not in FLOATS:
            raise ValueError(f"dtype: needs one of {', '.join([*FLOATS, *FP8])}")
        return leader.dtype
    dtype = name_of(dtype)
    storage_dtype(dtype)
    return dtype


def scales_of(scale: Any, name: str, num_layers: int, leader: Array) -> list[Any]:
    """The scale of each layer, from one for all of them or a list.

    Raises ValueError or TypeError for what the ops would not take beside `leader`.
    """
    if not isinstance(scale, list | tuple):
        _check_scale(scale, name, leader)
        return [scale] * num_layers
    if len(scale) != num_layers:
        raise ValueError(f"{name}: {len(scale)} scales, needs one, or one for each of {num_layers}")
    for layer, one in enumerate(scale):
        _check_scale(one, f"{name}[{layer}]", leader)
    return list(scale)


def _check_scale(scale: Any, name: str, leader: Array) -> None:
    read = checks.scale(scale, name, launch_stream(leader.owner, None))
    if isinstance(read, Array):
        checks.same_place([read], leader)


def _array_of(framework: str | None, device: Any) -> Any:
    """An empty array of a framework, by name."""
    if framework == "jax":
        raise _immutable("framework")
    if framework is None:
        raise TypeError(
            "like: is missing, needs an array whose framework and device the cache is to have, or "
            f"framework= one of {', '.join(FRAMEWORKS)}"
        )
    if framework not in FRAMEWORKS:
        raise ValueError(
            f"framework: got {framework!r}, needs one of {', '.join(FRAMEWORKS)}, or like=an array"
        )
    if framework == "cupy":
        if not gpu.cupy().is_available():
            raise RuntimeError(
                'framework: "cupy" finds no CUDA device, "numpy" needs none; '
                "`python -m cupy_paged info` says what is missing"
            )
        with gpu.on(gpu.cupy().cuda.runtime.getDevice() if device is None else device):
            return gpu.cupy().empty(0, np.float32)
    if framework == "torch":
        import torch

        return torch.empty(0, dtype=torch.float32, device=device)
    if device is not None:
        raise ValueError(f"device: got {device!r}, but NumPy arrays are on the host")
    return np.empty(0, np.float32)


def _immutable(name: str) -> TypeError:
    return TypeError(
        f"{name}: JAX arrays are immutable and cannot hold a cache; make it with "
        'framework="cupy" ("numpy" on the host), and write and attend with JAX arrays'
    )
