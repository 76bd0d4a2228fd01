"""GPU arrays of CuPy, torch and JAX, and of protocols alone."""

import cupy
import numpy as np
import pytest

import cupy_paged
from support import compare, frameworks, ops
from support.bad_calls import off_by
from support.data import Case, build
from support.framework_suite import (
    FrameworkSuite,
    OnlyCudaArrayInterface,
    check_refuses_to_write,
)

CUPY, *OTHERS = frameworks.device()
ARRAYS = "query", "key_cache", "value_cache", "block_tables", "seq_lens", "alibi_slopes"
JAX = pytest.mark.parametrize(
    "arrays", [a for a in OTHERS if a.name == "jax"], ids=lambda arrays: arrays.name
)


@pytest.fixture(params=[CUPY, *OTHERS], ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestFrameworks(FrameworkSuite):
    @pytest.fixture
    def reference(self):
        return CUPY


def test_named_frameworks_are_installed():
    missing = [a.name for a in (CUPY, *OTHERS) if isinstance(a, frameworks.Missing)]
    assert not missing


def test_arrays_known_by_the_cuda_array_interface_alone():
    problem = build(Case(seq_lens=(40, 17)))
    given = ops.arguments(problem, CUPY)
    names = "key_cache", "value_cache", "block_tables", "seq_lens"
    wrapped = {name: OnlyCudaArrayInterface(given[name]) for name in names}
    out, _ = ops.paged_attention(problem, CUPY, **wrapped)
    compare.bitwise(out, ops.paged_attention(problem, CUPY)[0])


@pytest.mark.parametrize("name", ["key_cache", "value_cache", "block_tables", "seq_lens"])
def test_an_array_on_the_host_among_those_on_a_device_is_named(arrays, name):
    problem = build(Case(seq_lens=(40, 17)))
    on_host = ops.arguments(problem, frameworks.host()[0])[name]
    with pytest.raises(ValueError, match=f"^{name}: is on the host, but query is on cuda:0"):
        ops.paged_attention(problem, arrays, **{name: on_host})


@pytest.mark.parametrize("name", ARRAYS)
def test_an_odd_address_is_named(name):
    problem = build(Case(seq_lens=(40, 17), alibi=True))
    given = dict(zip(ARRAYS, (*problem.inputs, problem.alibi_slopes), strict=True))
    with pytest.raises(ValueError, match=f"^{name}: address 0x.*multiple"):
        ops.paged_attention(problem, CUPY, **{name: CUPY.array(off_by(1)(given[name]))})


def test_out_on_the_host_is_named():
    problem = build(Case(seq_lens=(40, 17)))
    out = np.full(problem.query.shape, 7, np.float16)
    with pytest.raises(ValueError, match=r"^out: is on the host"):
        ops.paged_attention(problem, CUPY, out=out)
    assert (out == 7).all()


@JAX
def test_pending_jax_work_is_awaited(arrays):
    problem = build(Case(seq_lens=(2000, 17)))
    given = ops.arguments(problem, arrays)
    numpy = arrays.jax.numpy

    @arrays.jax.jit
    def slow(query, matrix):
        for _ in range(60):
            matrix = numpy.tanh(matrix @ matrix)
        return query + (0 * matrix[0, 0]).astype(query.dtype)

    matrix = arrays.array(np.full((4096, 4096), 1e-4, np.float32))
    slow(given["query"], matrix).block_until_ready()
    for _ in range(5):
        given["query"] = slow(given["query"], matrix)
        out = cupy_paged.paged_attention(**given)
        compare.close(arrays.numpy(out), problem.expected[0], "float16")


@JAX
def test_jax_arrays_dropped_after_the_call_live_until_it_has_run(arrays):
    problem = build(Case(seq_lens=(20000, 17)))
    for _ in range(20):
        given = ops.arguments(problem, arrays)
        out = cupy_paged.paged_attention(**given)
        shapes = [given[name].shape for name in ("query", "key_cache", "value_cache")]
        given.clear()
        taken = [arrays.jax.numpy.full(shape, np.nan, np.float16) for shape in shapes]
        compare.close(arrays.numpy(out), problem.expected[0], "float16")
        del taken


@JAX
def test_jax_arrays_are_not_written(arrays):
    check_refuses_to_write(arrays)


def test_results_in_managed_memory():
    problem = build(Case(seq_lens=(40, 17)))
    expected, _ = ops.paged_attention(problem, CUPY)
    with cupy.cuda.using_allocator(cupy.cuda.malloc_managed):
        out, _ = ops.paged_attention(problem, CUPY)
    compare.bitwise(out, expected)
