"""Arrays that a stream cannot be told about live until the work on them is done, and no longer."""

import subprocess
import sys
import threading
import weakref

import pytest

from cupy_paged import gpu, in_flight
from cupy_paged.arrays import Array
from cupy_paged.streams import ordered
from support.fake_cupy import FakeCuPy
from support.receipt import ROOT


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuPy()
    monkeypatch.setattr(gpu, "cupy", lambda: fake)
    monkeypatch.setattr(in_flight, "_queues", {})
    return fake


class Owner:
    """An array's memory, as far as Python knows."""


def run_op(device=0, stream=0, framework="jax"):
    """An op on an array that nobody else keeps: a weak reference to that array."""
    owner = Owner()
    read = Array("x", owner, framework, "float16", (4,), (1,), 0x1000, device, False)
    with ordered(stream, device, "cupy", [read]):
        pass
    return weakref.ref(owner)


@pytest.mark.parametrize("framework", ["jax", "dlpack"])
def test_an_array_lives_until_its_op_has_run(fake, framework):
    owner = run_op(framework=framework)
    run_op(framework="cupy")
    assert owner() is not None
    fake.finished.add(1)
    run_op(framework="cupy")
    assert owner() is None


@pytest.mark.parametrize(("device", "stream"), [(0, 7), (1, 0), (1, 7)])
@pytest.mark.parametrize("framework", ["cupy", "jax"])
def test_the_next_op_anywhere_releases_it(fake, device, stream, framework):
    owner = run_op()
    fake.finished.add(1)
    run_op(device, stream, framework)
    assert owner() is None


def test_streams_do_not_wait_for_each_other(fake):
    slow, *fast = run_op(0, 7), run_op(0, 8), run_op(1, 7), run_op(0, 8)
    fake.finished.update([2, 3])
    run_op(framework="cupy")
    assert [owner() is None for owner in (slow, *fast)] == [False, True, True, False]


def test_nothing_is_left_of_a_stream_that_is_done(fake):
    for stream in range(10, 20):
        run_op(0, stream)
    fake.finished.update(range(1, 11))
    run_op(framework="cupy")
    assert in_flight._queues == {}


def test_a_capture_neither_keeps_nor_releases(fake):
    owner = run_op(0, 7)
    fake.finished.add(1)
    fake.capturing.add(8)
    captured = run_op(0, 8)
    assert owner() is not None
    assert captured() is None


def test_an_owner_may_run_an_op_when_it_ends(fake):
    class RunsAnOp:
        def __del__(self):
            run_op(0, 9)

    in_flight.keep(0, 7, [RunsAnOp()])
    fake.finished.add(1)
    run_op(framework="cupy")
    assert list(in_flight._queues) == [(0, 9)]


def test_threads(fake, monkeypatch):
    class AlwaysDone:
        done = True

    monkeypatch.setattr(gpu, "record", lambda device, stream: AlwaysDone())
    failures = []

    def work(stream):
        try:
            for _ in range(300):
                run_op(0, stream % 3)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    run_op(framework="cupy")
    assert in_flight._queues == {}


LEFT_AT_EXIT = """
import atexit
from cupy_paged import gpu, in_flight

class Framework:
    alive = True

atexit.register(lambda: setattr(Framework, "alive", False))

class Owner:
    def __del__(self):
        print("array ends", "before" if Framework.alive else "after", "its framework")

class Event:
    done = False

gpu.record = lambda device, stream: Event()
in_flight.keep(0, 7, [Owner()])
"""


def test_at_exit_arrays_end_before_their_framework():
    done = subprocess.run(
        [sys.executable, "-c", LEFT_AT_EXIT], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("array ends before its framework\n", "")


def test_the_end_of_an_array_does_not_change_the_current_device(fake):
    class Leaves:
        def __del__(self):
            fake.device = 1

    in_flight.keep(0, 5, [Leaves()])
    fake.finished.add(1)
    in_flight.release_finished(0, 5)
    assert not in_flight._queues
    assert fake.device == 0
