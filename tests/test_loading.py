"""CuPy on its way into a process, and kernels on theirs to a device, with a stand-in for both.

An old driver or CuPy, threads that come first together, captures, several devices, and processes
that are forked meanwhile.
"""

import contextlib
import os
import sys
import threading
import time

import pytest

from cupy_paged import compiler, gpu, kernel_cache, prepared, requirements
from support import first_calls
from support.fake_cupy import FakeCuPy
from support.fake_driver import FakeDriver
from support.first_calls import small_kernels

KERNEL, OTHER = small_kernels()


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """One for CUDA 13, whatever this machine has."""
    FakeDriver(13000).install(monkeypatch)


def stand_in(built_for=13000, version="14.2.0"):
    """What `import cupy` finds: a FakeCuPy with versions."""
    fake = FakeCuPy()
    fake.__version__ = version
    fake.cuda.runtime.runtimeGetVersion = lambda: built_for
    return fake


# ---- CuPy, as it is imported ----


@pytest.mark.parametrize(
    ("driver", "built_for", "words"),
    [
        (
            12090,
            13000,
            r"driver runs CUDA 12\.9 at most: install a driver for CUDA 13 \(580 or newer\), "
            r'or pip uninstall -y cupy-cuda13x && pip install "cupy-cuda12',
        ),
        (
            11080,
            12090,
            r"driver runs CUDA 11\.8 at most: install a driver for CUDA 12 \(525[^)]*\)$",
        ),
        (12020, 12090, None),
        (13000, 12090, None),
        (None, 13000, None),
    ],
    ids=["too old", "too old for any CuPy", "an older minor version", "newer", "none"],
)
def test_a_driver_older_than_cupy_is_refused_before_it_is_asked(
    monkeypatch, driver, built_for, words
):
    fake, wheel = stand_in(built_for), f"cupy-cuda{built_for // 1000}x"
    monkeypatch.setattr(
        requirements, "installed_version", lambda name: "14.2.0" if name == wheel else None
    )
    monkeypatch.setattr("cupy_paged.driver.cuda_driver", lambda: driver and FakeDriver(driver))
    monkeypatch.setitem(sys.modules, "cupy", fake)
    if words is None:
        assert gpu.cupy.__wrapped__() is fake
    else:
        with pytest.raises(RuntimeError, match=words):
            gpu.cupy.__wrapped__()


def test_an_old_cupy_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", stand_in(version="14.1.9"))
    with pytest.raises(ImportError, match=r"CuPy 14\.1\.9 is too old.*pip install \"cupy-cuda1"):
        gpu.cupy.__wrapped__()


def test_a_driver_that_no_cupy_fits_is_named_where_cupy_is_missing(monkeypatch):
    monkeypatch.setattr("cupy_paged.driver.cuda_driver", lambda: FakeDriver(11040))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(
        ImportError, match=r"need CuPy .*: the driver is too old.* CUDA 11\.4 at most"
    ):
        gpu.cupy.__wrapped__()


def test_threads_import_cupy_one_after_the_other(monkeypatch):
    """The environment that an import is given is the process's."""
    inside, most = 0, 0

    @contextlib.contextmanager
    def lets_cupy_in():
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        yield
        inside -= 1

    monkeypatch.setitem(sys.modules, "cupy", stand_in())
    monkeypatch.setattr(kernel_cache, "lets_cupy_in", lets_cupy_in)
    gpu.cupy.cache_clear()
    threads = [threading.Thread(target=gpu.cupy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gpu.cupy.cache_clear()
    assert most == 1


# ---- loading ----


@pytest.fixture
def machine(monkeypatch):
    fake = stand_in()
    fake.install(monkeypatch)
    monkeypatch.setattr(gpu, "_contexts", {})
    gpu.device_limits.cache_clear()
    yield fake
    gpu.device_limits.cache_clear()  # what is read once was read of a stand-in


def test_an_image_that_the_driver_refuses(machine, monkeypatch):
    def refuse(module, image):
        raise RuntimeError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    monkeypatch.setattr(machine.cuda.Module, "load", refuse)
    monkeypatch.setattr(compiler, "_version", lambda: "13.1")
    with pytest.raises(
        RuntimeError, match=r"driver, for CUDA 13\.0.*NVRTC 13\.1.*PTX_VERSION"
    ) as e:
        compiler.load(KERNEL, 0, 0)
    assert "python -m cupy_paged info" in str(e.value)
    assert str(e.value.__cause__) == "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
    assert not compiler.is_loaded(KERNEL, 0)


def test_dynamic_shared_memory_is_asked_for(machine, monkeypatch):
    asked = []
    monkeypatch.setattr(machine.cuda.driver, "funcSetAttribute", lambda *a: asked.append(a))
    monkeypatch.setattr(
        machine.cuda.driver, "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", "most"
    )
    compiler.load(KERNEL, 0, 0)
    loaded = compiler.load(KERNEL._replace(shared_bytes=200_000), 0, 0)
    assert asked == [(loaded.function.ptr, "most", 200_000)]


def test_every_device_is_asked_for_shared_memory_of_its_own(machine, monkeypatch):
    asked = []
    monkeypatch.setattr(
        machine.cuda.driver,
        "funcSetAttribute",
        lambda function, *_: asked.append((machine.device, function)),
    )
    large = KERNEL._replace(shared_bytes=200_000)
    first, second, again = (compiler.load(large, device, 0) for device in (0, 1, 0))
    assert asked == [(0, first.function.ptr), (1, second.function.ptr)]
    assert first is again and first.function.ptr != second.function.ptr


def test_a_capture_that_is_the_first_to_need_a_kernel_is_left_as_it_is(machine, monkeypatch):
    compiled = []
    monkeypatch.setattr(compiler, "binary_of", lambda *asked: compiled.append(asked))
    machine.capturing.add(7)
    with pytest.raises(RuntimeError, match="call the op once with the same shapes and dtypes"):
        compiler.load(KERNEL, 0, 7)
    assert machine.take() == compiled == []
    assert not compiler.is_loaded(KERNEL, 0)


def test_each_device_loads_a_kernel_for_itself_once(machine):
    loaded = [compiler.load(KERNEL, device, 0) for device in (0, 1, 0, 1)]
    assert loaded[:2] == loaded[2:]
    assert machine.take() == [(device, "loadKernel", KERNEL.name) for device in (0, 1)]


def test_threads_that_need_a_kernel_first_compile_it_once(machine, monkeypatch):
    number, compiled, found = 32, [], []
    ready, binary_of = threading.Barrier(number), compiler.binary_of

    def slow(kernel, *arguments):
        compiled.append(kernel)
        time.sleep(0.05)
        return binary_of(kernel, *arguments)

    def load(i):
        ready.wait()
        found.append(compiler.load((KERNEL, OTHER)[i % 2], 0, 0))

    monkeypatch.setattr(compiler, "binary_of", slow)
    threads = [threading.Thread(target=load, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(compiled) == sorted([KERNEL, OTHER])
    assert len(found) == number
    assert len({id(loaded) for loaded in found}) == 2


# ---- fork ----


@pytest.fixture(params=["runtime", "driver"])
def used_cuda(monkeypatch, request):
    """A CuPy one of whose halves says that CUDA is not usable in a process that was forked."""
    fake, parent = stand_in(), os.getpid()

    class CUDARuntimeError(RuntimeError):
        status = 3

    class CUDADriverError(RuntimeError):
        status = 3

    errors = {"runtime": CUDARuntimeError, "driver": CUDADriverError}

    def answer(half, value):
        if half == request.param and os.getpid() != parent:
            raise errors[half]("initialization error")
        return value

    cuda = fake.cuda
    cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError = errors.values()
    cuda.runtime.getDeviceCount = lambda: answer("runtime", 1)
    cuda.driver.ctxGetCurrent = lambda: answer("driver", 0)
    fake.error = errors[request.param]
    monkeypatch.setitem(sys.modules, "cupy", fake)
    gpu.cupy.cache_clear()
    yield fake
    gpu.cupy.cache_clear()


def in_child(function):
    return first_calls.in_child(lambda: first_calls.error_of(function))


def test_cuda_that_was_used_before_a_fork_is_refused_in_the_child(used_cuda):
    assert gpu.cupy() is used_cuda
    said = in_child(gpu.cupy)
    assert said["error"].startswith("RuntimeError: CUDA was used before this process was forked")
    assert 'get_context("spawn")' in said["error"]
    assert "initialization error" in said["cause"]
    assert in_child(lambda: in_child(gpu.cupy) and gpu.cupy())["error"] == said["error"]
    assert gpu.cupy() is used_cuda


def test_cuda_may_be_used_first_in_the_child(used_cuda):
    used_cuda.cuda.runtime.getDeviceCount = lambda: 1
    used_cuda.cuda.driver.ctxGetCurrent = lambda: 0
    assert in_child(gpu.cupy) == {"error": None, "cause": None}


def test_another_error_of_cuda_in_the_child_is_left_to_whoever_meets_it(used_cuda):
    used_cuda.error.status = 35
    assert in_child(gpu.cupy) == {"error": None, "cause": None}


def test_a_lock_that_was_held_at_the_fork_does_not_hang_the_child(used_cuda):
    with compiler._lock:
        said = in_child(lambda: compiler.load(KERNEL, 0, 0))
    assert "before this process was forked" in said["error"]


def test_an_import_of_another_thread_at_the_fork_does_not_hang_the_child(used_cuda):
    with gpu._importing.lock:
        said = in_child(gpu.cupy)
    assert "before this process was forked" in said["error"]


def test_a_child_forgets_the_calls_that_were_prepared(monkeypatch):
    monkeypatch.setitem(prepared._kept.calls, ("a call",), None)
    monkeypatch.setitem(prepared._kept.last, "an op", None)
    assert first_calls.in_child(lambda: len(prepared._kept.calls) + len(prepared._kept.last)) == 0
    assert prepared._kept.calls and prepared._kept.last
