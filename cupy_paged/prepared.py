"""Calls that repeat an earlier one, known again without being checked again.

All that checks and plans look at is a call's *likeness*: of each array its dtype, shape, strides,
device and the alignment of its address, and every other argument as it is. Calls alike differ in
addresses alone, so that what was prepared for the first serves the next. Only arrays of one
framework, CuPy's or torch's own, are described here; other calls have no likeness, and are checked.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cupy_paged import gpu

MOST = 1024  # prepared calls; some KB each
WIDEST_ACCESS = 16  # bytes: what no alignment beyond can matter to

# Types whose values never change and have the same meaning wherever they are equal.
_PLAIN = {type(None), bool, int, float, str, np.int32, np.int64, np.float32, np.float64}

_calls: dict[tuple[Any, ...], Any] = {}


class Likeness(NamedTuple):
    """What tells a call from others, and what does not."""

    key: tuple[Any, ...]
    settings: tuple[Any, ...]
    pointers: list[int]  # of the arguments that may be arrays; 0 for those that are none


def likeness(settings: tuple[Any, ...], arrays: tuple[Any, ...]) -> Likeness | None:
    """The likeness of a call, from the arguments that are no arrays, and those that may be.

    The first of `arrays` leads. None where the others are arrays of another type, or anything
    cannot be read: checks know what to say about that.
    """
    kind = type(arrays[0])
    describe = _describer(kind)
    if describe is None:
        return None
    pointers = []
    try:
        # Types belong to the key, because True == 1 == 1.0, which are not the same to a check.
        key = [kind, gpu.emulated_sm(), settings, *map(type, settings)]
        for x in arrays:
            if type(x) is kind:
                pointer, facts = describe(x)
                pointers.append(pointer)
                key.append(facts)
            elif type(x) in _PLAIN:
                pointers.append(0)
                key += (type(x), x)
            else:
                return None
    except Exception:
        return None
    return Likeness(tuple(key), settings, pointers)


def find(seen: Likeness | None) -> Any:
    """What was kept for a call like this one; None if nothing was."""
    try:
        return None if seen is None else _calls.get(seen.key)
    except TypeError:  # an argument that cannot be hashed
        return None


def keep(seen: Likeness | None, prepared: Any) -> None:
    """Keeps what serves all calls like this one, which has been checked; None serves none."""
    if seen is None or prepared is None:
        return
    if not _PLAIN.issuperset(map(type, seen.settings)):
        return
    # Whoever reads meanwhile finds a call or does not, and a lost one is prepared again: no lock.
    if len(_calls) >= MOST:
        _calls.clear()
    _calls[seen.key] = prepared


Describer = Callable[[Any], tuple[int, tuple[Any, ...]]]
"""An array -> its address, and all else that anybody looks at."""


@functools.cache
def _describer(kind: type) -> Describer | None:
    # A subclass may mean something else by what is read here.
    if kind is getattr(sys.modules.get("cupy"), "ndarray", None):
        return _describe_cupy
    if kind is getattr(sys.modules.get("torch"), "Tensor", None):
        return _describe_torch
    return None


def _describe_cupy(x: Any) -> tuple[int, tuple[Any, ...]]:
    memory = x.data
    pointer = memory.ptr
    return pointer, (x.dtype, x.shape, x.strides, memory.device_id, pointer % WIDEST_ACCESS)


def _describe_torch(x: Any) -> tuple[int, tuple[Any, ...]]:
    pointer = x.data_ptr()
    return pointer, (x.dtype, x.shape, x.stride(), x.device, pointer % WIDEST_ACCESS)
