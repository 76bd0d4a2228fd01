"""Calls that repeat an earlier one, known again without being checked again.

All that checks and plans look at is a call's *likeness*: of each array its dtype, shape, strides,
device and the alignment of its address, how many addresses there are, and every other argument as
it is. Calls alike differ in addresses alone, so that what was prepared for the first serves the
next. That arrays overlap in part is seen in the first call of its kind, and in checked mode. Only
arrays of one framework, CuPy's or torch's own, are described here; other calls have no likeness,
and are checked.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from cupy_paged import checked_mode, gpu
from cupy_paged.graph_breaks import breaks_graphs
from cupy_paged.prepared_call import PreparedCall

MOST = 1024  # prepared calls; some KB each
WIDEST_ACCESS = 16  # bytes: what no alignment beyond can matter to

# Types whose values never change and have the same meaning wherever they are equal.
_PLAIN = {type(None), bool, int, float, str, np.int32, np.int64, np.float32, np.float64}


class _Kept:
    """Prepared calls by their likeness, and the last one of each op with its own."""

    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], PreparedCall] = {}
        self.last: dict[str, tuple[list[Any], PreparedCall]] = {}

    def forget(self) -> None:
        self.calls, self.last = {}, {}


# Whoever reads meanwhile finds a call or does not, and a lost one is prepared again: no lock.
_kept = _Kept()
gpu.in_forked_process(_kept.forget)

_NO_CALL = None, None


@breaks_graphs
def repeat(
    leader: Any, settings: tuple[Any, ...], arrays: tuple[Any, ...], stream: Any
) -> list[Any] | None:
    """Queues a call if one like it was kept, without checking it again.

    leader      the array whose framework runs the call
    settings    the arguments that are no arrays, after the name of the op
    arrays      those that may be, in the order of their pointers in the parameters; None where
                the call is to put a pointer of its own

    Returns the arrays that the call has made. Returns None, and has done nothing, for a call unlike
    all others, in checked mode, and while the stream is being captured.
    """
    if checked_mode.is_on():
        return None
    try:
        key, pointers = _likeness(leader, settings, arrays)
        # The layers of a model call alike, and to compare takes half as long as to hash, too.
        last_key, call = _kept.last.get(settings[0], _NO_CALL)
        if key != last_key:
            call = _kept.calls.get(tuple(key))
            if call is None:
                return None
            _kept.last[settings[0]] = key, call
    except Exception:  # whatever cannot be read or hashed: checks know what to say about it
        return None
    return call.again(pointers, stream)


def keep(
    leader: Any, settings: tuple[Any, ...], arrays: tuple[Any, ...], call: PreparedCall | None
) -> None:
    """Keeps what serves all calls like this one, which has been checked; None serves none."""
    others = [x for x in arrays if type(x) is not type(leader)]
    if call is None or not _PLAIN.issuperset(map(type, (*settings, *others))):
        return
    try:
        key, _ = _likeness(leader, settings, arrays)
    except Exception:
        return
    if len(_kept.calls) >= MOST:
        _kept.calls.clear()
    _kept.calls[tuple(key)] = call


def _likeness(
    leader: Any, settings: tuple[Any, ...], arrays: tuple[Any, ...]
) -> tuple[list[Any], list[int]]:
    """What tells a call from others, and its pointers; raises for calls that have no likeness."""
    kind = type(leader)
    # Types come first, because True == 1 == 1.0, which are not the same to a check.
    key = [*map(type, arrays), *map(type, settings), gpu.emulated_sm(), *settings]
    pointers, bits = _describer(kind)(kind, arrays, key)
    key.append(len(set(pointers)))  # one array in two places: whether it may be, checks decide
    if bits % WIDEST_ACCESS:
        key += [pointer % WIDEST_ACCESS for pointer in pointers]
    return key, pointers


Describer = Callable[[type, tuple[Any, ...], list[Any]], tuple[list[int], int]]
"""Adds to a key what anybody looks at but addresses; returns those, and which bits they have.

To call something for every array would take as long as this does.
"""


@functools.cache
def _describer(kind: type) -> Describer:
    # A subclass may mean something else by what is read here.
    if kind is getattr(sys.modules.get("cupy"), "ndarray", None):
        return _describe_cupy
    if kind is getattr(sys.modules.get("torch"), "Tensor", None):
        return _describe_torch
    raise TypeError


def _describe_cupy(kind: type, arrays: tuple[Any, ...], key: list[Any]) -> tuple[list[int], int]:
    pointers, bits = [], 0
    for x in arrays:
        if type(x) is kind:
            memory = x.data
            pointer = memory.ptr
            bits |= pointer
            key += x.dtype, x.shape, x.strides, memory.device_id
            pointers.append(pointer)
        else:
            key.append(x)
            pointers.append(0)
    return pointers, bits


def _describe_torch(kind: type, arrays: tuple[Any, ...], key: list[Any]) -> tuple[list[int], int]:
    pointers, bits = [], 0
    for x in arrays:
        if type(x) is kind:
            pointer = x.data_ptr()
            bits |= pointer
            key += x.dtype, x.shape, x.stride(), x.device
            pointers.append(pointer)
        else:
            key.append(x)
            pointers.append(0)
    return pointers, bits
