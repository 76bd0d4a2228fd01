"""What many thousand calls leave behind on a device, which is nothing."""

import gc

import cupy
import pytest

import cupy_paged
from cupy_paged import compiler, counters, gpu, in_flight, prepared
from support import frameworks, merge_suite, ops
from support.cache_suite import tokens
from support.data import Case, build
from support.framework_suite import OnlyDLPack

CUPY = frameworks.device()[0]
WRITABLE = frameworks.writable(frameworks.device())
# Long enough for partitions, which need scratch memory and counters.
CASE = Case(layout="vllm", seq_lens=(1100, 17, 0))


def attention(arrays, rng):
    given = ops.arguments(build(CASE), arrays)
    return lambda: cupy_paged.paged_attention(**given, return_lse=True)


def attention_into_out(arrays, rng):
    given = ops.arguments(build(CASE), arrays)
    out = arrays.array(build(CASE).query)
    return lambda: cupy_paged.paged_attention(**given, out=out)


def cache_writes(arrays, rng):
    problem = build(CASE)
    rows = map(arrays.array, tokens(rng, CASE, 5))
    caches = map(arrays.array, (problem.key_cache, problem.value_cache))
    given = *rows, *caches, arrays.array(rng.permutation(48)[:5])
    return lambda: cupy_paged.reshape_and_cache(*given, "auto", 1.0, 1.0)


def merges(arrays, rng):
    given = [arrays.array(array) for array in merge_suite.states(rng, "float16")]
    return lambda: cupy_paged.merge_attn_states(None, *given)


def merges_into_output(arrays, rng):
    states = merge_suite.states(rng, "float16")
    given = [arrays.array(array) for array in (states[0], *states, states[1])]
    return lambda: cupy_paged.merge_attn_states(*given)


def held(arrays, call):
    """How much there is of all that would grow if calls left something of theirs behind."""
    arrays.synchronize()
    call()  # which lets go of what the calls before it needed
    arrays.synchronize()
    gc.collect()
    pool = cupy.get_default_memory_pool()
    found = {
        "bytes in use of CuPy's pool": pool.used_bytes(),
        "bytes of CuPy's pool": pool.total_bytes(),
        "kernels": len(compiler._loaded),
        "prepared calls": len(prepared._kept.calls),
        "slabs of counters": len(counters._kept),
        "counters taken": sum(taken for _, taken in counters._slabs.values()),
        "streams with counters": len(counters._of_streams),
        "events of arrays in flight": sum(map(len, in_flight._queues.values())),
        "objects for streams": gpu.external_stream.cache_info().currsize,
    }
    if arrays.name == "torch":
        found["bytes in use of torch's pool"] = arrays.torch.cuda.memory_allocated()
        found["bytes of torch's pool"] = arrays.torch.cuda.memory_reserved()
    return found


def check_flat(arrays, call, num_calls):
    for _ in range(100):
        call()
    before = held(arrays, call)
    for _ in range(num_calls):
        call()
    after = held(arrays, call)
    grown = {name: (before[name], n) for name, n in after.items() if n > before[name]}
    assert not grown, f"(before, after) {num_calls} calls: {grown}"


@pytest.mark.parametrize("arrays", WRITABLE, ids=lambda arrays: arrays.name)
@pytest.mark.parametrize(
    "op",
    [attention, attention_into_out, cache_writes, merges, merges_into_output],
    ids=lambda op: op.__name__,
)
def test_many_calls_leave_nothing_behind(op, arrays, rng):
    check_flat(arrays, op(arrays, rng), 20_000)


def test_arrays_kept_for_their_producers_are_given_back():
    given = ops.arguments(build(CASE), CUPY)
    key_cache = given.pop("key_cache")
    # A new object each time, which the library keeps until the device has done the call.
    check_flat(
        CUPY,
        lambda: cupy_paged.paged_attention(**given, key_cache=OnlyDLPack(key_cache)),
        2000,
    )
