"""Operators on the arrays of one device while another one is current, and stays it."""

import contextlib
import gc
import itertools

import cupy
import numpy as np
import pytest

import cupy_paged
from support import cache_suite, compare, frameworks, merge_suite, ops, oracle
from support.data import Case, build, empty_caches
from support.framework_suite import FrameworkSuite, OnlyCudaArrayInterface

DEVICE = 1
ALL = frameworks.device(DEVICE)
CUPY = ALL[0]
WRITABLE = frameworks.writable(ALL)
by_name = {"ids": lambda arrays: arrays.name}
# About 50 ms: far more than the host needs to queue what a test queues.
DELAY = np.int64(80_000_000)
spin = cupy.RawKernel(
    'extern "C" __global__ void spin(long long cycles) {'
    " long long start = clock64(); while (clock64() - start < cycles); }",
    "spin",
)


def current_devices():
    torch = [arrays.torch.cuda.current_device() for arrays in ALL if arrays.name == "torch"]
    return {cupy.cuda.runtime.getDevice(), *torch}


@pytest.fixture(autouse=True)
def another_device_is_current(request):
    cupy.cuda.Device(0).use()
    yield
    left = current_devices()
    # JAX's own work leaves its device behind, as does the end of its arrays.
    gc.collect()
    cupy.cuda.Device(0).use()
    assert left == {0} or "jax" in request.node.name


@pytest.fixture(params=ALL, **by_name)
def arrays(request):
    return request.param


class TestFrameworks(FrameworkSuite):
    @pytest.fixture
    def reference(self):
        return CUPY


# ---- every operator ----


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
@pytest.mark.parametrize(
    "case",
    [
        Case(seq_lens=(1030, 17, 0, 513)),
        Case("bfloat16", "fp8", "vllm", seq_lens=(40, 17), alibi=True),
        Case("float32", "auto", "NHD", seq_lens=(700, 1)),
    ],
    ids=str,
)
def test_attention(arrays, case):
    ops.check_attention(build(case), arrays)


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
def test_merge(arrays, rng):
    given = merge_suite.states(rng, "float16")
    merge_suite.check(given, arrays, "float16")
    output, lse = cupy_paged.merge_attn_states(None, *(arrays.array(array) for array in given))
    assert current_devices() == {0}
    assert arrays.owns(output) and arrays.owns(lse)
    compare.close(arrays.numpy(output), oracle.merge_attn_states(*given)[0], "float16")


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
@pytest.mark.parametrize("layout", ["vllm", "HND", "NHD"])
@pytest.mark.parametrize("scales", ["numbers", "arrays"])
def test_cache_writers(arrays, layout, scales, rng):
    case = Case(kv_cache_dtype="fp8", layout=layout)
    key, value = cache_suite.tokens(rng, case, 30)
    changes = {}
    if scales == "arrays":
        made = [arrays.array(np.full(1, scale, np.float32)) for scale in case.scales]
        changes = dict(zip(("k_scale", "v_scale"), made, strict=True))
    slots = cache_suite.slots(rng, case, 30, 4)
    cache_suite.check(case, key, value, empty_caches(case, 4, rng), slots, arrays, **changes)


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
def test_convert(arrays):
    codes = np.arange(120, dtype=np.uint8)
    output = ops.empty(codes.shape, "float16", arrays)
    cupy_paged.convert_fp8(output, arrays.array(codes), 0.5)
    assert current_devices() == {0}
    expected = codes.view(oracle.FP8["fp8"]).astype(np.float32) * 0.5
    compare.bitwise(arrays.numpy(output), expected.astype(np.float16))


def test_the_device_may_be_the_current_one_and_the_other_by_turns(arrays):
    problem = build(Case(seq_lens=(700, 17)))
    home = next(other for other in frameworks.device(0) if other.name == arrays.name)
    expected, _ = ops.paged_attention(problem, arrays)
    for current in 0, 1, 0:
        with cupy.cuda.Device(current):
            for on in arrays, home:
                out, _ = ops.paged_attention(problem, on)
                compare.bitwise(out, expected)
            assert current_devices() == {current}


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
def test_a_context_that_the_runtime_was_not_told_of(arrays):
    driver, contexts = cupy.cuda.driver, []
    for device in 0, 1:
        cupy.cuda.runtime.setDevice(device)
        contexts.append(driver.ctxGetCurrent())
    problem = build(Case(seq_lens=(700, 17)))
    home = next(other for other in frameworks.device(0) if other.name == arrays.name)
    for on in arrays, home:
        given = ops.arguments(problem, on)
        for device, context in enumerate(contexts):
            cupy.cuda.runtime.setDevice(0)
            driver.ctxSetCurrent(context)
            for _ in range(2):  # checked, then known again
                out = cupy_paged.paged_attention(**given)
                assert driver.ctxGetCurrent() == contexts[device]
            cupy.cuda.runtime.setDevice(0)
            compare.close(on.numpy(out), problem.expected[0], "float16")


@pytest.mark.parametrize("name", ["key_cache", "value_cache", "block_tables", "seq_lens"])
def test_an_array_on_another_device_is_named(arrays, name):
    problem = build(Case(seq_lens=(40, 17)))
    elsewhere = ops.arguments(problem, frameworks.device(0)[0])[name]
    with pytest.raises(ValueError, match=f"^{name}: is on cuda:0, but query is on cuda:{DEVICE}"):
        ops.paged_attention(problem, arrays, **{name: elsewhere})


# ---- order ----


@contextlib.contextmanager
def current_stream(arrays, stream):
    """Makes `stream` the framework's current one on `DEVICE`, and leaves the current device."""

    def use(stream):
        if arrays.name == "torch":
            with arrays.torch.cuda.device(DEVICE):
                arrays.torch.cuda.set_stream(stream)
        else:
            with cupy.cuda.Device(DEVICE):
                stream.use()

    if arrays.name == "torch":
        before = arrays.torch.cuda.current_stream(DEVICE)
    else:
        before = cupy.cuda.get_current_stream(DEVICE)
    use(stream)
    try:
        yield
    finally:
        use(before)


def stream_of(arrays, kind):
    """(stream, address): the framework's default stream of `DEVICE`, or a new one."""
    if arrays.name == "torch":
        cuda = arrays.torch.cuda
        stream = cuda.default_stream(DEVICE) if kind == "default" else cuda.Stream(DEVICE)
        return stream, stream.cuda_stream
    with cupy.cuda.Device(DEVICE):
        default = cupy.cuda.Stream.null
        stream = default if kind == "default" else cupy.cuda.Stream(non_blocking=True)
        return stream, stream.ptr


def delay(address):
    with cupy.cuda.Device(DEVICE), cupy.cuda.ExternalStream(address, DEVICE):
        spin((1,), (1,), (DELAY,))


def busy(address):
    with cupy.cuda.Device(DEVICE):
        return not cupy.cuda.ExternalStream(address, DEVICE).done


def assign(array, value):
    """Queues a write on the current stream of the array's framework."""
    with cupy.cuda.Device(DEVICE):  # CuPy writes to the arrays of the current device
        array[...] = value


@pytest.fixture(scope="module")
def problem():
    return build(Case(seq_lens=(2000, 17, 0, 513)))


def synchronize():
    cupy.cuda.Device(DEVICE).synchronize()


def make_ready(given, *delayed):
    """Compiles what a test queues, which takes longer than the delay."""
    synchronize()  # arrays come on default streams, which no other stream waits for
    cupy_paged.paged_attention(**given)
    for address in delayed:
        delay(address)
    synchronize()


# The default streams of two frameworks are one stream.
KINDS = ("default", "side"), ("side", "default"), ("side", "side")
EVERY_PAIR = pytest.mark.parametrize(
    ("owner", "other", "owner_kind", "other_kind"),
    [
        (*pair, *kinds)
        for pair in itertools.permutations(frameworks.writable(ALL), 2)
        for kinds in KINDS
    ],
    ids=lambda value: getattr(value, "name", value),
)


@EVERY_PAIR
@pytest.mark.parametrize("name", ["key_cache", "block_tables"])
def test_a_write_on_the_stream_of_another_framework_is_awaited(
    owner, other, owner_kind, other_kind, name, problem
):
    given = {**ops.arguments(problem, other), "query": owner.array(problem.query)}
    late, right = given[name], other.array(getattr(problem, name))
    (own, _), (foreign, address) = stream_of(owner, owner_kind), stream_of(other, other_kind)
    with current_stream(owner, own), current_stream(other, foreign):
        make_ready(given, address)
        assign(late, right)
        assign(late, 0)
        synchronize()
        delay(address)
        assign(late, right)
        out = cupy_paged.paged_attention(**given)
        assert current_devices() == {0}
        assert busy(address), "the call waited for the device"
        synchronize()
    compare.close(owner.numpy(out), problem.expected[0], "float16")


@EVERY_PAIR
def test_another_framework_may_overwrite_its_array_after_the_call(
    owner, other, owner_kind, other_kind, problem
):
    given = {**ops.arguments(problem, other), "query": owner.array(problem.query)}
    (own, address), (foreign, _) = stream_of(owner, owner_kind), stream_of(other, other_kind)
    with current_stream(owner, own), current_stream(other, foreign):
        assign(other.array(problem.value_cache), np.nan)
        make_ready(given, address)
        delay(address)
        out = cupy_paged.paged_attention(**given)
        assign(given["value_cache"], np.nan)
        synchronize()
    compare.close(owner.numpy(out), problem.expected[0], "float16")


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
@pytest.mark.parametrize("kind", ["default", "side"])
def test_a_cuda_array_interface_is_awaited(arrays, kind, problem):
    given = ops.arguments(problem, arrays)
    late, right = CUPY.array(problem.key_cache), CUPY.array(problem.key_cache)
    (own, _), (foreign, address) = stream_of(arrays, kind), stream_of(CUPY, "side")
    given["key_cache"] = OnlyCudaArrayInterface(late, address)
    with current_stream(arrays, own):
        make_ready(given, address)
        assign(late, right)
        assign(late, 0)
        synchronize()
        delay(address)
        with current_stream(CUPY, foreign):
            assign(late, right)
        out = cupy_paged.paged_attention(**given)
        assert current_devices() == {0}
        assert busy(address), "the call waited for the device"
        synchronize()
    compare.close(arrays.numpy(out), problem.expected[0], "float16")


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
@pytest.mark.parametrize("form", ["object", "address"])
def test_a_given_stream_is_used(arrays, form, problem):
    given = ops.arguments(problem, arrays)
    late, right = given["query"], arrays.array(problem.query)
    stream, address = stream_of(arrays, "side")
    make_ready(given, address)
    assign(late, right)
    assign(late, 0)
    synchronize()
    delay(address)
    with current_stream(arrays, stream):
        assign(late, right)
    out = cupy_paged.paged_attention(**given, stream=stream if form == "object" else address)
    assert current_devices() == {0}
    assert busy(address), "the call waited for the device"
    synchronize()
    compare.close(arrays.numpy(out), problem.expected[0], "float16")


@pytest.mark.parametrize("arrays", WRITABLE, **by_name)
def test_a_graph_captured_while_another_device_is_current(arrays, problem):
    given = ops.arguments(problem, arrays)
    given["out"] = out = ops.empty(problem.query.shape, "float16", arrays)
    dirt = np.full(problem.query.shape, np.nan, np.float16)
    stream, _ = stream_of(CUPY, "side")
    make_ready(given)
    with cupy.cuda.Device(DEVICE):
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeGlobal)
    cupy_paged.paged_attention(**given, stream=stream)
    assert current_devices() == {0}
    with cupy.cuda.Device(DEVICE):
        graph = stream.end_capture()
    for _ in range(3):
        arrays.fill(out, dirt)
        synchronize()
        with cupy.cuda.Device(DEVICE):
            graph.launch(stream)
        synchronize()
        compare.close(arrays.numpy(out), problem.expected[0], "float16")


JAX = pytest.mark.parametrize("jax", [a for a in ALL if a.name == "jax"], **by_name)


@JAX
@pytest.mark.parametrize("name", ["query", "key_cache"])
def test_pending_jax_work_is_awaited(jax, name, problem):
    # The op is on the default stream: DLPack's number for it means that of the current device.
    given = ops.arguments(problem, CUPY)
    numpy = jax.jax.numpy

    @jax.jax.jit
    def slow(array, matrix):
        for _ in range(60):
            matrix = numpy.tanh(matrix @ matrix)
        return array + (0 * matrix[0, 0]).astype(array.dtype)

    right = jax.array(getattr(problem, name))
    matrix = jax.array(np.full((4096, 4096), 1e-4, np.float32))
    given[name] = slow(right, matrix).block_until_ready()
    make_ready(given)
    for _ in range(5):
        given[name] = slow(right, matrix)
        before = current_devices()
        out = cupy_paged.paged_attention(**given)
        assert current_devices() == before
        owner = jax if name == "query" else CUPY
        assert owner.owns(out)
        compare.close(owner.numpy(out), problem.expected[0], "float16")


@JAX
def test_jax_arrays_dropped_after_the_call_live_until_it_has_run(jax):
    problem = build(Case(seq_lens=(20000, 17)))
    for _ in range(20):
        given = ops.arguments(problem, jax)
        out = cupy_paged.paged_attention(**given)
        shapes = [given[name].shape for name in ("query", "key_cache", "value_cache")]
        given.clear()
        with jax.jax.default_device(jax.device):
            taken = [jax.jax.numpy.full(shape, np.nan, np.float16) for shape in shapes]
        compare.close(jax.numpy(out), problem.expected[0], "float16")
        del taken
