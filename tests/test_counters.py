"""Who shares the counters of a kernel, and who must not."""

import itertools
import threading
from types import SimpleNamespace

import pytest

from cupy_paged import counters as module
from cupy_paged import gpu
from cupy_paged.counters import FEWEST, SIZE, SLAB, counters
from support.fake_cupy import FakeCuPy


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuPy()
    taken = [0x10_0000]

    def zeros(device, num_bytes):
        fake.log("zeros", device, num_bytes)
        taken[0] += 1 << 30
        return SimpleNamespace(ptr=taken[0])

    monkeypatch.setattr(gpu, "cupy", lambda: fake)
    monkeypatch.setattr(gpu, "zeros", zeros)
    for name in "_slabs", "_of_streams":
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(module, "_kept", [])
    return fake


def address(device=0, stream=7, count=10):
    with counters(device, stream, count) as found:
        return found


def apart(spans):
    """Whether (address, count) spans share no byte."""
    spans = sorted(spans)
    return all(
        first + count * SIZE <= second for (first, count), (second, _) in itertools.pairwise(spans)
    )


def test_a_stream_keeps_its_counters(fake):
    assert address() == address(count=FEWEST)
    assert [name for _, name, *_ in fake.take()] == ["zeros"]


def test_streams_devices_and_threads_on_their_default_streams_are_apart(fake):
    spans = [(address(device, stream), FEWEST) for device in (0, 1) for stream in (0, 7, 8, 2)]
    thread = threading.Thread(target=lambda: spans.append((address(0, 2), FEWEST)))
    thread.start()
    thread.join()
    assert apart(spans)


def test_more_counters_are_other_counters_and_the_old_ones_stay_allocated(fake):
    few, many = address(), address(count=10 * FEWEST)
    assert apart([(few, FEWEST), (many, 10 * FEWEST)])
    assert address() == many
    assert len(module._kept) == 1


def test_a_batch_that_grows_row_by_row_allocates_a_few_times(fake):
    spans = {(address(count=8 * rows), 8 * rows) for rows in range(1, 4000)}
    assert len({start for start, _ in spans}) == 4
    assert len([name for _, name, *_ in fake.take() if name == "zeros"]) == 1


def test_a_thread_that_is_gone_leaves_its_counters_to_nobody(fake):
    spans = []
    for _ in range(20):
        thread = threading.Thread(target=lambda: spans.append((address(0, 2), FEWEST)))
        thread.start()
        thread.join()
    assert apart(spans)


def test_every_call_in_a_graph_has_counters_of_its_own(fake):
    own = address()
    fake.capturing.add(7)
    spans = [(own, FEWEST), *((address(count=1000), 1000) for _ in range(100))]
    assert apart(spans)


def test_a_full_slab_is_replaced_outside_of_graphs(fake):
    address()
    fake.capturing.add(7)
    captured = address(count=SLAB // 2 + 1)
    fake.capturing.clear()
    address()
    fake.capturing.add(7)
    assert apart([(captured, SLAB // 2 + 1), (address(count=SLAB), SLAB)])


def test_a_graph_without_room_clears_counters_in_every_replay(fake):
    fake.capturing.add(7)
    fake.take()
    assert address(count=12) == 0xA000
    assert fake.take() == [
        (0, "mallocAsync", 12 * SIZE, 7),
        (0, "memsetAsync", 0xA000, 0, 12 * SIZE, 7),
        (0, "freeAsync", 0xA000, 7),
    ]
