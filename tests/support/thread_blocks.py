"""Devices that hold fewer thread blocks at a time than the one at hand."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from cupy_paged import launch, prepared


@contextlib.contextmanager
def at_most(count: int | None) -> Iterator[None]:
    """Kernels that take any grid run on so many thread blocks at most; as it is, for None.

    Cases of a test are small: only on a few thread blocks does each of them do several pieces,
    groups of them among these.
    """
    load = launch.load
    with mock.patch.object(prepared, "_kept", prepared._Kept()), contextlib.ExitStack() as patches:
        if count is not None:
            fewer = mock.patch.object(
                launch, "load", lambda *key: load(*key)._replace(max_blocks=count)
            )
            patches.enter_context(fewer)
        yield
