"""Checked mode on host arrays, and how it is turned on."""

import os
import subprocess
import sys
import threading

import pytest

import cupy_paged
from cupy_paged import checked_mode
from support import frameworks
from support.checked_suite import CheckedReadsSuite, CheckedWritesSuite
from support.receipt import ROOT

ARRAYS = frameworks.host()
by_name = {"ids": lambda arrays: arrays.name}


class TestCheckedReads(CheckedReadsSuite):
    @pytest.fixture(params=ARRAYS, **by_name)
    def arrays(self, request):
        return request.param


class TestCheckedWrites(CheckedWritesSuite):
    @pytest.fixture(params=frameworks.writable(ARRAYS), **by_name)
    def arrays(self, request):
        return request.param


def test_it_is_off_and_of_one_thread():
    assert not checked_mode.is_on()
    seen = []
    with cupy_paged.checked():
        assert checked_mode.is_on()
        thread = threading.Thread(target=lambda: seen.append(checked_mode.is_on()))
        thread.start()
        thread.join()
        with cupy_paged.checked(False):
            assert not checked_mode.is_on()
        assert checked_mode.is_on()
    assert not checked_mode.is_on()
    assert seen == [False]


@pytest.mark.parametrize(("setting", "expected"), [("1", True), ("0", False), ("", False)])
def test_the_environment_turns_it_on(setting, expected):
    code = "from cupy_paged import checked_mode; print(checked_mode.is_on())"
    environment = os.environ | {"CUPY_PAGED_CHECK": setting}
    command = [sys.executable, "-c", code]
    found = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert found.strip() == str(expected)
