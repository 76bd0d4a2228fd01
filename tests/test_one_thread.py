"""A `PagedKVCache` that threads share: calls that overlap are errors, and finalizers are heard."""

import contextlib
import gc
import os
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import cupy_paged
from cupy_paged import kv_cache
from support import first_calls
from support.small_cache import new, ones


@pytest.fixture
def inside(monkeypatch):
    """`begin` holds another thread inside of a cache's `attend`; `end` gives what it returned."""
    entered, leave = threading.Event(), threading.Event()
    attend, results, threads = kv_cache.paged_attention, [], []

    def wait(*arguments, **options):
        if not entered.is_set():
            entered.set()
            assert leave.wait(60)
        return attend(*arguments, **options)

    def begin(cache, batch):
        def work():
            results.append(cache.attend(0, ones(1), batch))

        threads.append(threading.Thread(target=work))
        threads[0].start()
        assert entered.wait(60)

    def end():
        leave.set()
        for thread in threads:
            thread.join()
        return results

    monkeypatch.setattr(kv_cache, "paged_attention", wait)
    yield SimpleNamespace(begin=begin, end=end)
    end()


def test_a_second_thread_is_refused_while_one_is_inside(inside):
    cache = new(num_host_blocks=4)
    sequence, waiting, offloaded = cache.add(range(6)), cache.add([1]), cache.add([2])
    cache.offload(offloaded)
    batch = cache.batch([sequence])
    cache.write(0, ones(6), ones(6), batch)
    before = repr(cache)
    inside.begin(cache, batch)
    calls = {
        "add": lambda: cache.add([1]),
        "append": lambda: cache.append(waiting, [1]),
        "fork": lambda: cache.fork(sequence),
        "truncate": lambda: cache.truncate(waiting, 0),
        "free": lambda: cache.free(waiting),
        "offload": lambda: cache.offload(waiting),
        "restore": lambda: cache.restore(offloaded),
        "batch": lambda: cache.batch([waiting]),
        "write": lambda: cache.write(0, 7 * ones(6), 7 * ones(6), batch),
        "attend": lambda: cache.attend(0, ones(1), batch),
        "commit": lambda: cache.commit(batch),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"^cache: used by two threads .* in {name};"):
            call()
    assert repr(cache) == before
    (out,) = inside.end()
    assert (out == 1).all()
    for call in calls.values():  # once the other thread has left, or an error has been raised
        with contextlib.suppress(ValueError):
            call()


def test_a_thread_that_met_an_error_is_no_longer_inside():
    cache = new()
    with pytest.raises(cupy_paged.NeverFits):
        cache.add(range(99))
    added = []
    thread = threading.Thread(target=lambda: added.append(cache.add([1])))
    thread.start()
    thread.join()
    assert cache.sequences == added != []


def test_a_finalizer_is_heard_once_nobody_is_inside(inside):
    cache = new()
    first, second, third = (cache.add([i]) for i in range(3))
    cache.free_when_idle([first])
    assert cache.sequences == [second, third], "nobody was inside"
    inside.begin(cache, cache.batch([third]))
    cache.free_when_idle([second])
    assert cache.sequences == [second, third]
    inside.end()
    cache.free_when_idle([])
    assert cache.sequences == [third]


@pytest.mark.parametrize("method", ["add", "attend"])
def test_a_finalizer_in_the_middle_of_a_method_waits_for_the_next(method, monkeypatch):
    cache, counted = new(), []
    sequence, ended = cache.add([1]), cache.add([2])
    batch = cache.batch([sequence])
    cache.write(0, ones(1), ones(1), batch)
    holder, name = (cache.pool, "add") if method == "add" else (kv_cache, "paged_attention")
    run = getattr(holder, name)

    def in_the_middle(*arguments, **options):
        cache.free_when_idle([ended])
        counted.append(len(cache.sequences))
        return run(*arguments, **options)

    monkeypatch.setattr(holder, name, in_the_middle)
    cache.add([3]) if method == "add" else cache.attend(0, ones(1), batch)
    assert counted == [2] and ended in cache.sequences
    monkeypatch.undo()
    cache.append(sequence, [4])
    assert ended not in cache.sequences


def test_blocks_of_a_finalizer_are_there_for_who_needs_them(inside):
    cache = new(num_blocks=2)
    batch = cache.batch([cache.add([1])])
    ended = cache.add([2])
    inside.begin(cache, batch)
    cache.free_when_idle([ended])
    inside.end()
    assert len(cache.add([3])) == 1


@pytest.mark.parametrize("method", ["add", "write", "attend"])
def test_a_thread_waits_for_a_finalizer_of_another(method, monkeypatch):
    # It alone uses the cache: to refuse it for what the collector does elsewhere would be wrong.
    cache = new()
    sequence, ended = cache.add([1]), cache.add([2])
    batch = cache.batch([sequence])
    entered, leave, free = threading.Event(), threading.Event(), cache.pool.free

    def slowly(sequence):
        entered.set()
        assert leave.wait(60)
        free(sequence)

    monkeypatch.setattr(cache.pool, "free", slowly)
    finalizer = threading.Thread(target=cache.free_when_idle, args=([ended],))
    finalizer.start()
    assert entered.wait(60)
    threading.Timer(0.05, leave.set).start()
    if method == "add":
        cache.add([3])
    elif method == "write":
        cache.write(0, ones(1), ones(1), batch)
    else:
        cache.attend(0, ones(1), batch)
    assert leave.is_set(), "it has not waited"
    finalizer.join()
    assert ended not in cache.sequences


def test_a_finalizer_in_the_middle_of_another_waits_for_its_end(monkeypatch):
    cache, depths = new(), []
    first, second = cache.add([1]), cache.add([2])
    free, depth = cache.pool.free, 0

    def and_another(sequence):
        nonlocal depth
        depth += 1
        depths.append(depth)
        if sequence is first:
            cache.free_when_idle([second])
        free(sequence)
        depth -= 1

    monkeypatch.setattr(cache.pool, "free", and_another)
    cache.free_when_idle([first])
    assert depths == [1, 1] and cache.sequences == []


def test_what_was_freed_before_its_finalizer_was_heard_is_left_out(inside):
    cache = new()
    first, second, third = (cache.add([i]) for i in range(3))
    inside.begin(cache, cache.batch([third]))
    cache.free_when_idle([first, second])
    inside.end()
    cache.pool.free(first)
    cache.append(third, [4])
    assert cache.sequences == [third]


def test_what_a_finalizer_has_left_does_not_keep_the_cache(inside):
    cache = new()
    ended = cache.add([1])
    inside.begin(cache, cache.batch([cache.add([2])]))
    cache.free_when_idle([ended])
    inside.end()
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


def test_a_thread_may_come_in_again(monkeypatch):
    cache = new()
    first, second = cache.add(range(3)), cache.add([1])
    batch, attend = cache.batch([first]), kv_cache.paged_attention

    def and_free(*arguments, **options):
        cache.free(second)
        return attend(*arguments, **options)

    monkeypatch.setattr(kv_cache, "paged_attention", and_free)
    cache.write(0, ones(3), ones(3), batch)
    assert (cache.attend(0, ones(1), batch) == 1).all()
    assert cache.sequences == [first]


def steps_of_threads(cache, number, num_steps, turn):
    """(results that are right, results that are wrong, errors) of threads that step one cache."""
    right, wrong, errors = [], [], []
    ready = threading.Barrier(number)

    def step(value):
        with turn:
            sequence = cache.add(count=1 + value % 7)
            batch = cache.batch([sequence])
            rows = np.full((len(sequence), 2, 8), value, np.float32)
            for layer in range(cache.num_layers):
                cache.write(layer, rows, rows, batch)
                out = cache.attend(layer, ones(1), batch)
                (right if (out == value).all() else wrong).append(out)

    def work(thread):
        ready.wait(60)
        for i in range(num_steps):
            try:
                step(thread * num_steps + i)
            except (RuntimeError, ValueError) as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return right, wrong, errors


@pytest.fixture
def often(monkeypatch):
    """Threads take turns as often as Python lets them."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_whose_steps_mix_get_errors_and_no_wrong_numbers(often):
    cache = new(num_layers=4, num_blocks=800)
    right, wrong, errors = steps_of_threads(cache, 4, 100, contextlib.nullcontext())
    assert right and errors and not wrong
    kinds = {"cache: used by two threads at once", "batch: is over; another one was taken since"}
    assert {error.partition(",")[0] for error in errors} <= kinds


def test_threads_that_take_turns_get_what_they_wrote(often):
    cache = new(num_layers=4, num_blocks=800)
    right, wrong, errors = steps_of_threads(cache, 4, 25, threading.Lock())
    assert (len(right), wrong, errors) == (4 * 4 * 25, [], [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_a_cache_that_a_thread_was_in_at_a_fork_works_in_the_child(inside):
    cache = new()
    inside.begin(cache, cache.batch([cache.add([1])]))
    assert first_calls.in_child(lambda: len(cache.add(range(3)))) == 3
    with pytest.raises(RuntimeError, match="used by two threads"):
        cache.add(range(3))
    assert len(inside.end()) == 1
