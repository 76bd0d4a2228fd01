"""Host arrays of NumPy, torch and JAX, for real."""

import os
import subprocess
import sys

import numpy as np
import pytest

import cupy_paged
from support import compare, frameworks, ops, receipt
from support.bad_calls import read_only
from support.data import Case, build
from support.framework_suite import (
    FrameworkSuite,
    OnlyDLPack,
    check_refuses_to_write,
    writing_calls,
)

NUMPY, *OTHERS = frameworks.host()


@pytest.fixture(params=[NUMPY, *OTHERS], ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestFrameworks(FrameworkSuite):
    @pytest.fixture
    def reference(self):
        return NUMPY


def test_named_frameworks_are_installed():
    missing = [a.name for a in (NUMPY, *OTHERS) if isinstance(a, frameworks.Missing)]
    known = {"numpy", "cupy", "torch", "jax", "transformers", "numba", "cuda.core"}
    unknown = frameworks.REQUIRED - known
    assert not missing and not unknown


def test_read_only_arrays_are_not_written():
    for name, positional, keywords, written in writing_calls(NUMPY):
        for argument, i in written.items():
            given = list(positional)
            given[i] = given[i].copy()
            given[i].flags.writeable = False
            before = given[i].copy()
            with pytest.raises(ValueError, match=f"^{argument}: is read-only"):
                getattr(cupy_paged, name)(*given, **keywords)
            compare.bitwise(given[i], before, f"{name}: {argument}")


def test_read_only_inputs_are_welcome():
    problem = build(Case(seq_lens=(40, 17)))
    given = ops.arguments(problem, NUMPY)
    for value in given.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    out = cupy_paged.paged_attention(**given)
    compare.close(out, problem.expected[0], "float16")


def test_out_known_by_dlpack_alone_is_written():
    problem = build(Case(seq_lens=(40, 17)))
    out = np.full(problem.query.shape, np.nan, np.float16)
    wrapped = OnlyDLPack(out)
    assert cupy_paged.paged_attention(**ops.arguments(problem, NUMPY), out=wrapped) is wrapped
    compare.close(out, problem.expected[0], "float16")


def test_an_array_known_by_dlpack_alone_is_as_large_as_its_shape_says():
    problem = build(Case(seq_lens=(40, 17)))
    out = np.full(problem.query.shape, 7, np.float16)
    lens = out.reshape(-1)[-4:].view(np.int32)  # far past the sum of the dimensions
    before = out.copy()
    given = {**ops.arguments(problem, NUMPY), "seq_lens": OnlyDLPack(lens)}
    with pytest.raises(ValueError, match=r"^out: shares memory with seq_lens"):
        cupy_paged.paged_attention(**given, out=OnlyDLPack(out))
    compare.bitwise(out, before)


class UnversionedDLPack(OnlyDLPack):
    """One whose producer is older than the protocol's version 1."""

    def __dlpack__(self, stream=None):
        return self._array.__dlpack__(stream=stream)


def test_arrays_known_by_an_older_dlpack_alone():
    problem = build(Case(seq_lens=(40, 17)))
    given = ops.arguments(problem, NUMPY)
    names = "key_cache", "value_cache", "block_tables", "seq_lens"
    wrapped = {name: UnversionedDLPack(given[name]) for name in names}
    out, _ = ops.paged_attention(problem, NUMPY, **wrapped)
    compare.close(out, problem.expected[0], "float16")


def test_read_only_arrays_known_by_dlpack_alone_are_read():
    problem = build(Case(seq_lens=(40, 17)))
    given = ops.arguments(problem, NUMPY)
    names = "query", "key_cache", "value_cache", "block_tables", "seq_lens"
    wrapped = {name: OnlyDLPack(read_only(given[name])) for name in names}
    out, _ = ops.paged_attention(problem, NUMPY, **wrapped)
    compare.close(out, problem.expected[0], "float16")


def test_read_only_arrays_known_by_dlpack_alone_are_not_written():
    for name, positional, keywords, written in writing_calls(NUMPY):
        for argument, i in written.items():
            given = list(positional)
            kept = read_only(given[i])
            given[i], before = OnlyDLPack(kept), kept.copy()
            with pytest.raises(ValueError, match=f"^{argument}: is read-only"):
                getattr(cupy_paged, name)(*given, **keywords)
            compare.bitwise(kept, before, f"{name}: {argument}")


def adapter(name):
    found = frameworks.only(name, OTHERS)
    return pytest.mark.parametrize("arrays", found, ids=lambda arrays: arrays.name)


@adapter("torch")
def test_torch_tensors_that_require_grad(arrays):
    problem = build(Case(seq_lens=(40, 17)))
    query = arrays.array(problem.query).requires_grad_()
    out = cupy_paged.paged_attention(**{**ops.arguments(problem, arrays), "query": query})
    assert not out.requires_grad
    compare.close(arrays.numpy(out), problem.expected[0], "float16")


@adapter("torch")
def test_a_bfloat16_query_known_by_dlpack_alone(arrays):
    problem = build(Case("bfloat16", seq_lens=(40, 17)))
    given = ops.arguments(problem, arrays)
    out, lse = cupy_paged.paged_attention(
        **{**given, "query": OnlyDLPack(given["query"])}, return_lse=True
    )
    assert isinstance(out, np.ndarray) and isinstance(lse, np.ndarray)
    compare.close(out, problem.expected[0], "bfloat16")
    compare.close_lse(lse, problem.expected[1])


@adapter("jax")
def test_traced_jax_arrays_are_refused_with_a_reason(arrays):
    problem = build(Case(seq_lens=(40, 17)))
    given = ops.arguments(problem, arrays)
    query = given.pop("query")
    traced = arrays.jax.jit(lambda query: cupy_paged.paged_attention(query, **given))
    with pytest.raises(TypeError, match=r"^query: .*jax\.jit.*interop\.jax_ops"):
        traced(query)


@adapter("jax")
def test_results_are_on_the_jax_device_of_their_query(arrays):
    # Where JAX has a GPU its default device is that, whatever its arrays are on.
    code = """if True:
        import jax, jax.numpy as jnp
        import cupy_paged
        default, other = jax.devices()
        with jax.default_device(other):
            query = jnp.ones((2, 4, 8))
            cache = jnp.ones((3, 2, 16, 8))
            tables, lens = jnp.zeros((2, 2), "int32"), jnp.array([7, 20], "int32")
            lse = jnp.zeros((4, 2))
        outs = cupy_paged.paged_attention(
            query, cache, cache, tables, lens, layout="HND", return_lse=True
        )
        outs += cupy_paged.merge_attn_states(None, query, lse, query, lse)
        print({device for out in outs for device in out.devices()} == {other})
    """
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", code]
    found = subprocess.check_output(command, cwd=receipt.ROOT, env=os.environ | flags, text=True)
    assert found.strip() == "True"


@adapter("jax")
def test_jax_arrays_are_not_written(arrays):
    check_refuses_to_write(arrays)
