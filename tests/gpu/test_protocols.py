"""Arrays of Numba, of cuda.core and of our own, known by protocols alone, and calls of many kinds.

They give the bits of CuPy's arrays.
"""

import cupy
import numpy as np
import pytest

import cupy_paged
from support import compare, frameworks
from support.data import Case, build
from support.producers import MAKERS, Recording, VersionedArray
from support.workers import delay, is_busy

CUPY, *OTHERS = ADAPTERS = frameworks.device()
PRODUCERS = list(frameworks.present(MAKERS))
NUMBA = [producer for producer in PRODUCERS if producer.name == "numba"]
NAMES = "query", "key_cache", "value_cache", "block_tables", "seq_lens"
by_name = {"ids": lambda producer: producer.name}
anywhere = pytest.mark.parametrize("producer", PRODUCERS, **by_name)
on_streams = pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])


@pytest.fixture(scope="module")
def problem():
    return build(Case(seq_lens=(700, 17, 0)))


@pytest.fixture(scope="module")
def inputs(problem):
    """The arrays of a call of attention, by name, as contiguous ones of CuPy."""
    contiguous = map(np.ascontiguousarray, problem.inputs)
    return dict(zip(NAMES, map(CUPY.array, contiguous), strict=True))


def attend(problem, given):
    return cupy_paged.paged_attention(**given, layout="HND", scale=problem.scale)


def stream_of(side):
    return cupy.cuda.Stream(non_blocking=True) if side else cupy.cuda.Stream.null


def check_told(arrays, stream):
    """Check that our own producers were told the stream of the op, whose number 0 they call 1."""
    for asked in [x.asked for x in arrays if isinstance(x, Recording)]:
        assert asked and {told for told, _ in asked} == {stream.ptr or 1}
        assert all(version in (None, (1, 0)) for _, version in asked)


def test_named_producers_are_installed():
    assert not [one for one in PRODUCERS if isinstance(one, frameworks.Missing)]


@on_streams
@anywhere
def test_attention_over_arrays_of_a_producer(producer, side, problem, inputs):
    expected = CUPY.numpy(attend(problem, inputs))
    given = {name: producer.array(array) for name, array in inputs.items()}
    stream = stream_of(side)
    cupy.cuda.Device().synchronize()
    with stream:
        out = attend(problem, given)
    stream.synchronize()
    check_told(given.values(), stream)
    assert CUPY.owns(out)
    compare.bitwise(CUPY.numpy(out), expected)
    compare.close(expected, problem.expected[0], "float16")


@on_streams
@anywhere
def test_tokens_of_a_producer_are_written_into_its_caches(producer, side):
    rng = np.random.default_rng(0)
    tokens = [CUPY.array(rng.standard_normal((5, 2, 64)).astype(np.float16)) for _ in "kv"]
    slots = CUPY.array(np.array([3, 40, -1, 16, 0]))
    want = [CUPY.array(np.full((3, 16, 2, 64), np.nan, np.float16)) for _ in "kv"]
    given = [producer.array(array) for array in (*tokens, *want, slots)]
    cupy_paged.reshape_and_cache_flash(*tokens, *want, slots, "auto", 1.0, 1.0)
    stream = stream_of(side)
    cupy.cuda.Device().synchronize()
    with stream:
        cupy_paged.reshape_and_cache_flash(*given, "auto", 1.0, 1.0)
    stream.synchronize()
    check_told(given, stream)
    for name, cache, right in zip(("keys", "values"), given[2:4], want, strict=True):
        compare.bitwise(CUPY.numpy(producer.cupy(cache)), CUPY.numpy(right), name)
    compare.bitwise(CUPY.numpy(want[0][2, 8]), CUPY.numpy(tokens[0][1]))


@anywhere
def test_an_output_of_a_producer_is_written(producer, problem, inputs):
    expected = CUPY.numpy(attend(problem, inputs))
    out = producer.array(cupy.full(problem.query.shape, np.nan, np.float16))
    assert attend(problem, {**inputs, "out": out}) is out
    compare.bitwise(CUPY.numpy(producer.cupy(out)), expected)


class OrdersItself(VersionedArray):
    """An array that is written on a stream which its consumer does not know."""

    def __init__(self, array, stream):
        super().__init__(array)
        self.stream = stream

    def __dlpack__(self, *, stream=None, **options):
        cupy.cuda.ExternalStream(stream).wait_event(self.stream.record())
        return super().__dlpack__(stream=stream, **options)


def check_awaited(late, right, wrap, address, problem, inputs):
    """Check that an op waits for what is written into `late` on another stream.

    late    CuPy's view of the array that `wrap()` gives to the op
    """
    expected = CUPY.numpy(attend(problem, inputs))
    foreign, stream = cupy.cuda.ExternalStream(address), cupy.cuda.Stream(non_blocking=True)
    with foreign:
        late[...] = right
    with stream:  # compiles, makes events, and has memory for this stream
        attend(problem, {**inputs, "key_cache": wrap()})
    late.fill(np.nan)
    cupy.cuda.Device().synchronize()
    delay(address)
    with foreign:
        late[...] = right
    with stream:
        out = attend(problem, {**inputs, "key_cache": wrap()})
    assert is_busy(address), "the call waited for the device"
    stream.synchronize()
    compare.bitwise(CUPY.numpy(out), expected)


@pytest.mark.parametrize("producer", NUMBA, **by_name)
def test_the_stream_of_a_numba_array_is_awaited(producer, problem, inputs):
    stream, right = producer.cuda.stream(), inputs["key_cache"]
    array = producer.array(right, stream)
    check_awaited(cupy.asarray(array), right, lambda: array, int(stream), problem, inputs)


def test_a_dlpack_array_that_orders_itself_is_awaited(problem, inputs):
    stream, right = cupy.cuda.Stream(non_blocking=True), inputs["key_cache"]
    late = right.copy()
    check_awaited(late, right, lambda: OrdersItself(late, stream), stream.ptr, problem, inputs)


@pytest.mark.parametrize("turn", range(len(NAMES)))
def test_every_argument_of_another_kind(turn, problem, inputs):
    expected = CUPY.numpy(attend(problem, inputs))
    kinds = [*ADAPTERS, *PRODUCERS]
    given = {}
    for i, (name, array) in enumerate(inputs.items()):
        kind = kinds[(i + turn) % len(kinds)]
        is_framework = kind in ADAPTERS
        given[name] = kind.array(CUPY.numpy(array) if is_framework else array)
    leader = next((a for a in ADAPTERS if a.owns(given["query"])), CUPY)
    out = attend(problem, given)
    assert leader.owns(out)
    compare.bitwise(leader.numpy(out), expected)
