"""The benchmark of first calls, without a compiler."""

import numpy as np
import pytest

import cupy_paged
from benchmarks import check, compile_suite, first_call, frameworks, tables
from benchmarks.shapes import DTYPES, LAYOUTS
from support.benchmark_host import small_runner


@pytest.fixture
def runner(tmp_path, monkeypatch):
    return small_runner(tmp_path, monkeypatch)


def test_compile_suite(runner):
    def call(layout, dtypes, cache):
        cold = not any(cache.iterdir())
        (cache / "kernel").touch()
        if dtypes == "fp8" and not cold:
            (cache / "again").touch()
        return 1.5 if cold else 0.05

    compile_suite.run(runner, (("HND", "bf16"), ("HND", "fp8")), call)
    cold, warm, _, again = runner.result.measurements
    assert (cold.op, cold.time) == ("cold", 1.5e6)
    assert (warm.op, warm.time) == ("from disk", pytest.approx(5e4))
    assert again.status == "wrong"
    assert "1.500" in tables.markdown(runner.result, "x")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_first_call_is_valid(layout, dtypes):
    dtype, kv_dtype = (frameworks.numpy_dtype(name) for name in DTYPES[dtypes])
    caches = [np.zeros(s, kv_dtype) for s in first_call.cache_shapes(layout, kv_dtype.itemsize)]
    cupy_paged.paged_attention(
        np.zeros((1, 32, 128), dtype),
        *caches,
        np.zeros((1, 1), np.int32),
        np.ones(1, np.int32),
        layout=layout,
        kv_cache_dtype=check.kv_cache_dtype(DTYPES[dtypes][1]),
    )


def test_first_call_says_why_it_failed(tmp_path):
    with pytest.raises(RuntimeError, match="KeyError"):
        compile_suite.first_call("HND", "fp99", tmp_path)
