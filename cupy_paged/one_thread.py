"""Objects that one thread at a time may use: calls that overlap are errors, and not wrong results.

Nobody waits for another's method: a call that came in between those of another thread's step would
end that step, so that to wait for its turn only puts the error off. Finalizers alone are waited
for, which no step can tell from anything.
"""

from __future__ import annotations

import collections
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from cupy_paged import gpu

_LONGEST_FINALIZER = 1.0  # seconds
_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


class Turn:
    """Held by the thread that is inside an object. It may come in again: methods call each other.

    A finalizer may run at any place, in this thread or in another one, and cannot be refused: what
    it has to do is left to whoever comes in next, where nobody is inside.
    """

    __slots__ = ("__weakref__", "_left", "is_freeing", "is_inside", "lock")

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.is_inside = self.is_freeing = False
        self._left: collections.deque[Callable[[], None]] = collections.deque()
        _turns.add(self)

    def when_idle(self, call: Callable[[], None]) -> None:
        """Runs a call now, or, where a method is running, before the next `one_thread` begins."""
        self._left.append(call)
        if not self.is_inside and not self.is_freeing and self.lock.acquire(False):
            try:
                self.catch_up()
            finally:
                self.lock.release()

    def catch_up(self) -> None:
        self.is_freeing = True  # a finalizer in the middle of another is left to this loop
        try:
            while self._left:
                self._left.popleft()()
        finally:
            self.is_freeing = False

    def outlasts_finalizers(self) -> bool:
        """Takes the lock where no method holds it but a finalizer, and says whether it has it."""
        return not self.is_inside and self.lock.acquire(timeout=_LONGEST_FINALIZER)


class _HasTurn(Protocol):
    _turn: Turn


_Self = TypeVar("_Self", bound=_HasTurn)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def one_thread(
    method: Callable[Concatenate[_Self, _Arguments], _Result],
) -> Callable[Concatenate[_Self, _Arguments], _Result]:
    """Makes a method refuse a thread while another one is in a method of the same `_turn`."""

    @functools.wraps(method)
    def alone(self: _Self, /, *arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        turn = self._turn
        lock = turn.lock
        if not lock.acquire(False) and not turn.outlasts_finalizers():
            raise two_threads(method.__name__)
        was_inside = turn.is_inside
        try:
            if not was_inside:
                turn.is_inside = True
                turn.catch_up()
            return method(self, *arguments, **options)
        finally:
            turn.is_inside = was_inside
            lock.release()

    return alone


def two_threads(what: str) -> RuntimeError:
    """The error of a call that finds another thread inside."""
    return RuntimeError(
        f"cache: used by two threads at once, in {what}; needs a lock of yours, held by one of "
        "them from batch to commit, or a cache for each"
    )


def _renew_in_child() -> None:
    for turn in _turns:
        if turn.lock.acquire(False):
            turn.lock.release()
        else:  # the thread that is inside stayed behind in the parent
            turn.lock = threading.RLock()
            turn.is_inside = turn.is_freeing = False


gpu.in_forked_process(_renew_in_child)
