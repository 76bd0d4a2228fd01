"""Runs a share of the tests that were collected: a plugin of pytest, for tests/sanitize.py."""

import os

import pytest

VARIABLE = "CUPY_PAGED_TEST_SHARE"
"""Says which: "1/3" for the second of three, each of which is as mixed as all of them."""


@pytest.hookimpl(trylast=True)  # of what `-k` leaves: it may take every other one
def pytest_collection_modifyitems(items: list) -> None:
    index, count = map(int, os.environ[VARIABLE].split("/"))
    items[:] = items[index::count]
