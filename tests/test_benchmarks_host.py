"""The benchmark of the host's time in a call, as a whole on NumPy."""

import pytest

import cupy_paged
from benchmarks import host_suite, tables, timing
from support.benchmark_host import HostArrays, HostDevice, small_runner


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return small_runner(tmp_path, monkeypatch)


def test_host_calls_are_valid():
    calls = host_suite.our_calls(HostDevice(), HostArrays())
    assert len(calls) == 6
    for call in calls.values():
        call()


def test_host_time_is_of_blocks_that_take_turns():
    order, clock = [], iter(range(1000))

    def function(name):
        return lambda: order.append(name)

    found = host_suite.time_calls(
        {name: function(name) for name in "ab"}, lambda: None, 2, 3, lambda: next(clock)
    )
    assert "".join(order) == "aaabbb" * 3
    assert found["a"] == timing.summarise([1e6 / 3] * 2)


def test_host_suite_says_what_is_missing(runner, monkeypatch):
    def no_torch():
        raise ImportError("no torch")

    no_torch.name = "torch"
    monkeypatch.setattr(host_suite, "CuPy", HostArrays)
    monkeypatch.setattr(host_suite, "Torch", no_torch)
    monkeypatch.setattr(cupy_paged, "merge_attn_states", lambda *a: 1 / 0)
    host_suite.run(runner, rounds=2, calls=1)
    *found, merge = runner.result.measurements
    assert [(m.system, m.arrays, m.status) for m in found] == [("ours", "numpy", "ok")] * 5
    assert merge.note == "ZeroDivisionError: division by zero"
    assert runner.result.systems == {"torch": "not installed: no torch"}
    assert "| v1 | numpy |" in tables.markdown(runner.result, "x")
