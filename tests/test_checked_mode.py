"""Checked mode on host arrays, and how it is turned on."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest

import cupy_paged
from cupy_paged import checked_mode, gpu, streams
from cupy_paged.arrays import Array
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


@pytest.mark.parametrize(
    ("setting", "expected"), [("1", True), ("0", False), ("", False), ("Off", False)]
)
def test_the_environment_turns_it_on(setting, expected):
    code = "from cupy_paged import checked_mode; print(checked_mode.is_on())"
    environment = os.environ | {"CUPY_PAGED_CHECK": setting}
    command = [sys.executable, "-c", code]
    found = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert found.strip() == str(expected)


def test_what_another_framework_writes_is_awaited(monkeypatch):
    said = []

    def copy_rows(device, stream, target, target_step, source, step, row_bytes, num_rows):
        said.append(("copy", stream))
        ctypes.memset(target, 0xFF, row_bytes * num_rows)  # slots that are skipped

    monkeypatch.setattr(streams, "current", lambda framework, device: {"torch": 201}[framework])
    monkeypatch.setattr(gpu, "is_capturing", lambda device, stream: False)
    monkeypatch.setattr(gpu, "wait", lambda device, *waits: said.append(("wait", *waits)))
    monkeypatch.setattr(gpu, "copy_rows", copy_rows)
    monkeypatch.setattr(gpu, "synchronize", lambda device, stream: said.append(("done", stream)))
    slots = Array("slot_mapping", None, "torch", "int64", (4,), (1,), 0x1000, 0, False)
    checked_mode.check_slots(slots, 100, 101, "cupy")
    assert said == [("wait", 101, 201), ("copy", 101), ("done", 101), ("wait", 201, 101)]
