"""The ops inside of jax.jit on a GPU: XLA's stream, its memory and its command buffers."""

import functools
import os
import subprocess
import sys
import time

import cupy
import numpy as np
import pytest

import cupy_paged
from cupy_paged import compiler, in_flight
from support import compare, frameworks, ops
from support.data import Case, build
from support.jax_ops_suite import (
    EVERY_CALL,
    JaxOpsSuite,
    Steps,
    check_alike,
    contents,
    jax_ops,
    owned,
    step,
)
from support.receipt import ROOT

CUPY, *OTHERS = frameworks.device()
JAX = [arrays for arrays in OTHERS if arrays.name == "jax"]


@pytest.fixture(params=JAX, ids=lambda arrays: arrays.name)
def arrays(request):
    return request.param


class TestJaxOps(JaxOpsSuite):
    @pytest.fixture
    def reference(self):
        return CUPY


_kept = []  # kernels that graphs of XLA's may know for longer than a test


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    _kept.append({})
    monkeypatch.setattr(compiler, "_loaded", _kept[-1])


@pytest.fixture
def callbacks(monkeypatch):
    """Seconds that each callback of an attention has taken."""
    found, attend = [], jax_ops().attend

    def timed(*args, **options):
        start = time.perf_counter()
        attend(*args, **options)
        found.append(time.perf_counter() - start)

    monkeypatch.setattr(jax_ops(), "attend", timed)
    return found


def test_slow_work_around_an_op_is_ordered_by_xla_alone(arrays, callbacks):
    jax, numpy = arrays.jax, arrays.jax.numpy
    matrix = arrays.array(np.full((4096, 4096), 1e-4, np.float32))

    @functools.partial(jax.jit, donate_argnums=0)
    def run(caches, matrix, tables, query, *rest):
        for _ in range(60):
            matrix = numpy.tanh(matrix @ matrix)
        late = query + (0 * matrix[0, 0]).astype(query.dtype)
        caches, out = step(caches, tables, late, *rest)
        return caches, out * 2

    steps = Steps()  # once before, to load the kernels
    tables, each = arrays.array(steps.tables), steps.each(arrays)
    step(tuple(map(arrays.array, steps.caches)), tables, *(x[0] for x in each))
    for seed in range(0, 40, 10):  # other contents each time, or what is stale would be right
        steps = Steps(seed)
        caches = tuple(owned(arrays, x) for x in steps.caches)
        given = arrays.array(steps.tables), *(x[0] for x in steps.each(arrays))
        jax.block_until_ready((caches, given))
        start = time.perf_counter()
        caches, out = run(caches, matrix, *given)
        found = contents(arrays, out)[0]
        elapsed = time.perf_counter() - start
        outputs, *_ = steps.expected(CUPY)
        compare.bitwise(found, outputs[0] * 2)
    assert callbacks[-1] < elapsed / 2, (
        f"a callback took {callbacks[-1]:.3f} of {elapsed:.3f} s: it waits for the device"
    )


LAYERS, CALLS_OF_A_MODEL = 4, 16


def test_a_model_called_again_and_again(arrays):
    # XLA may record such calls and replay them; whether it does is for XLA to say.
    jax = arrays.jax

    @functools.partial(jax.jit, donate_argnums=0)
    def model(caches, tables, query, *rest):
        outputs = []
        for layer in range(LAYERS):
            caches[layer], out = step(caches[layer], tables, query, *rest)
            outputs.append(out)
        return caches, outputs

    caches = [tuple(owned(arrays, x) for x in Steps(0).caches) for _ in range(LAYERS)]
    wants = [tuple(CUPY.array(x) for x in Steps(0).caches) for _ in range(LAYERS)]
    for run in range(CALLS_OF_A_MODEL):
        steps = Steps(10 * run)
        tables, each = arrays.array(steps.tables), steps.each(arrays)
        caches, outputs = model(caches, tables, *(x[run % steps.NUM_STEPS] for x in each))
        tables, each = CUPY.array(steps.tables), steps.each(CUPY)
        query, key, value, slots, lens = (x[run % steps.NUM_STEPS] for x in each)
        for layer, (want, out) in enumerate(zip(wants, outputs, strict=True)):
            cupy_paged.reshape_and_cache_flash(
                key, value, *want, slots, "auto", 1.0, 1.0, layout="HND"
            )
            expected = cupy_paged.paged_attention(query, *want, tables, lens, layout="HND")
            compare.bitwise(arrays.numpy(out), CUPY.numpy(expected), f"call {run}, layer {layer}")
    for found, want in zip(caches, wants, strict=True):
        check_alike(contents(arrays, found), [CUPY.numpy(x) for x in want])


def test_a_branch_that_is_taken_later(arrays, nothing_is_loaded):
    # XLA may record it before it ever ran, and so before its kernel was loaded.
    jax, steps = arrays.jax, Steps()
    given = steps.query[0], *steps.caches, steps.tables, steps.lens[0]
    slopes = np.array([0.5, -0.25, 0.125, 1.0], np.float32)
    attend = functools.partial(jax_ops().paged_attention, layout="HND")

    @jax.jit
    def run(is_sloped, slopes, query, *rest):
        def sloped(query):
            return attend(query, *rest, alibi_slopes=slopes)

        def plain(query):
            return attend(query, *rest)

        outputs = []
        for _ in range(6):
            outputs.append(jax.lax.cond(is_sloped, sloped, plain, query))
            query = query + 0 * outputs[-1]  # one after the other
        return outputs

    on_gpu = [CUPY.array(x) for x in given]
    for is_sloped in (False, True):
        for _ in range(4):
            found = run(is_sloped, arrays.array(slopes), *map(arrays.array, given))
        want = cupy_paged.paged_attention(
            *on_gpu, layout="HND", alibi_slopes=CUPY.array(slopes) if is_sloped else None
        )
        check_alike(contents(arrays, found), [CUPY.numpy(want)] * len(found))


def test_a_kernel_is_loaded_beside_a_capture(nothing_is_loaded):
    problem = build(Case(seq_lens=(40, 17)))
    given = ops.arguments(problem, CUPY)
    out = cupy.empty_like(given["query"])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
    try:
        with compiler.loading_beside_captures():
            cupy_paged.paged_attention(**given, out=out, stream=stream)
    finally:
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    compare.close(CUPY.numpy(out), problem.expected[0], "float16")


@EVERY_CALL
def test_nothing_is_kept(arrays, make):
    call = make()
    run, given = arrays.jax.jit(call.run), call.arguments(arrays)
    cupy.cuda.Device().synchronize()
    in_flight.release_finished(0, 0)
    before = {key: len(queue) for key, queue in in_flight._queues.items()}
    for _ in range(3):
        run(**given)
    arrays.jax.block_until_ready(run(**given))
    assert {key: len(queue) for key, queue in in_flight._queues.items()} == before


REPLAYS = """
import jax
import numpy as np

from cupy_paged import gpu
from cupy_paged.interop import jax_ops

calls, captured, attend = 0, 0, jax_ops.attend

def counted(call, *others, **options):
    global calls, captured
    calls, captured = calls + 1, captured + gpu.is_capturing(0, call.stream)
    attend(call, *others, **options)

jax_ops.attend = counted
rng = np.random.default_rng(0)
key_cache, value_cache = jax.numpy.asarray(rng.standard_normal((2, 4, 2, 16, 64)), "float16")
tables, lens = jax.numpy.array([[0, 1], [2, 3]], "int32"), jax.numpy.array([20, 30], "int32")

def layers(query):
    for _ in range(6):
        query = jax_ops.paged_attention(query, key_cache, value_cache, tables, lens, layout="HND")
    return query

compiled = jax.jit(layers)
for _ in range(30):
    query = jax.numpy.asarray(rng.standard_normal((2, 8, 64)), "float16")
    found = np.asarray(compiled(query))
print(calls, captured, found.tobytes() == np.asarray(layers(query)).tobytes())
"""


def test_xla_replays_what_it_has_recorded():
    flags = "--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL"
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-c", REPLAYS]
    said = subprocess.check_output(command, cwd=ROOT, env=environment, text=True).split()
    calls, captured = map(int, said[:2])
    assert said[2] == "True"
    # 30 runs of 6 ops, and 6 of ops by themselves.
    assert 0 < captured < calls < 180 // 2, said
