"""Whether arrays share memory, which those that lie in each other's gaps do not.

Keys and values of one allocation take turns in it, block by block or token by token: from the
first byte to the last they overlap, and yet share none.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from cupy_paged.arrays import Array
from cupy_paged.dtypes import itemsize

_MAX_WORK = 10_000  # steps of a search for a byte in common


class _Span(NamedTuple):
    """The bytes that an array lies in: a part of every period, 0 if it has none."""

    begin: int
    end: int
    period: int
    part: int
    is_written: bool
    array: Array


def sharing(written: Sequence[Array], read: Sequence[Array]) -> tuple[Array, Array] | None:
    """An array that is to be written, and another one, of either kind, that shares memory with it.

    None if there are no such two. Strides must not be negative. Two arrays of which a search finds
    no end count as sharing.
    """
    spans = [_span(a, True) for a in written] + [_span(a, False) for a in read]
    spans = sorted((span for span in spans if 0 not in span.array.shape), key=_begin)
    near: list[_Span] = []  # overlap from the first byte to the last, one after the other
    end = 0
    for span in spans:
        if span.begin >= end:
            if found := _sharing_of(near):
                return found
            near = []
        near.append(span)
        end = max(end, span.end)
    return _sharing_of(near)


def _begin(span: _Span) -> int:
    return span.begin


def _span(a: Array, is_written: bool) -> _Span:
    reach, period, part = _reach(a.shape, a.strides, itemsize(a.dtype))
    return _Span(a.pointer, a.pointer + reach, period, part, is_written, a)


@functools.lru_cache(maxsize=256)  # the caches of all layers are alike
def _reach(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> tuple[int, int, int]:
    """Bytes from an array's first one past its last one, and its period and part."""
    dims = sorted((stride * size, n) for stride, n in zip(strides, shape, strict=True) if n > 1)
    reach = size + sum((n - 1) * step for step, n in dims)
    period, n = dims[-1] if dims else (0, 1)
    return reach, period, reach - (n - 1) * period


def _sharing_of(spans: list[_Span]) -> tuple[Array, Array] | None:
    if len(spans) < 2 or _take_turns(spans):
        return None
    for first, second in itertools.combinations(spans, 2):
        if not (first.is_written or second.is_written) or second.begin >= first.end:
            continue
        if np.may_share_memory(_view(first.array), _view(second.array), max_work=_MAX_WORK):
            one, other = (second, first) if second.is_written else (first, second)
            return one.array, other.array
    return None


def _take_turns(spans: list[_Span]) -> bool:
    """Whether all have one period, and each a part of it: the layers of one allocation, at once."""
    period = spans[0].period
    if period == 0 or any(span.period != period for span in spans):
        return False
    parts = sorted((span.begin % period, span.part) for span in spans)
    nexts = [*(begin for begin, _ in parts[1:]), parts[0][0] + period]
    return all(begin + part <= then for (begin, part), then in zip(parts, nexts, strict=True))


def _view(a: Array) -> np.ndarray:
    """What NumPy takes for an array at these addresses, which may be a device's: not to be read."""
    size = itemsize(a.dtype)
    interface = {
        "version": 3,
        "data": (a.pointer, True),
        "shape": a.shape,
        "strides": tuple(stride * size for stride in a.strides),
        "typestr": f"|V{size}",
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))
