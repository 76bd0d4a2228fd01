"""A call like an earlier one is not checked again, and is queued as if it were.

CuPy and torch are stand-ins here, and arrays of theirs are host memory that says it is on a device.
"""

import contextlib
import ctypes
import gc
import struct
import sys
import threading
import tracemalloc
import weakref
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from test_errors import BAD_CALLS

import cupy_paged
from cupy_paged import attention, cache_ops, counters, gpu, in_flight, merge, prepared
from cupy_paged.attention_kernels import PARAMS
from support import bad_calls, fake_cupy, ops
from support.bad_calls import (
    NUMPY,
    attention_arguments,
    convert_arguments,
    flash_arguments,
    merge_arguments,
    off_by,
    v1_arguments,
    vllm_arguments,
)
from support.data import Case, build
from support.fake_cupy import FakeCuPy, FakeTorch

PARAMS_OF = {
    "paged_attention": PARAMS,
    "paged_attention_v1": PARAMS,
    "merge_attn_states": merge.PARAMS,
    "reshape_and_cache": cache_ops.WRITE_PARAMS,
    "reshape_and_cache_flash": cache_ops.WRITE_PARAMS,
    "convert_fp8": cache_ops.CONVERT_PARAMS,
}
GOOD = {operator: bad_calls.GOOD[operator] for operator in PARAMS_OF}
FRAMEWORKS = {"cupy": fake_cupy.ndarray, "torch": fake_cupy.Tensor}
ALLOCATIONS = ("alloc", "torch.empty", "torch.alloc")


class Machine:
    """A fake CuPy and torch, and what was launched on them."""

    def __init__(self):
        self.cupy = FakeCuPy()
        self.cupy.launched = self._launched
        self.torch = FakeTorch(self.cupy)
        self.checked, self.params, self.packed = 0, PARAMS, []

    def _launched(self, address):
        self.packed.append(ctypes.string_at(address, self.params.size))

    def run(self, operator, kind, given, device=0):
        """What a call comes to: its error, or its calls of CUDA, parameters and results."""
        self.cupy.take()
        self.packed.clear()
        self.params = PARAMS_OF[operator]
        given = {
            name: kind(x, device) if isinstance(x, np.ndarray) else x for name, x in given.items()
        }
        try:
            result = getattr(cupy_paged, operator)(**given)
        except Exception as error:
            return type(error), str(error)
        # Without what is done once, and addresses that are never the same.
        calls = [
            call[:2] + call[3:] if call[1] in ALLOCATIONS else call
            for call in self.cupy.take()
            if call[1] != "loadKernel" and call[-1] != fake_cupy.NEW_STREAM
        ]
        params = [unpacked(packed, self.params) for packed in self.packed]
        return calls, params, described(result)


def unpacked(packed, params=PARAMS):
    """The fields of a struct by name; "new" for addresses of memory that the op obtained."""
    codes = {"pointer": "P", "int64": "q", "int": "i", "float": "f"}
    layout = "@" + "".join(codes[kind] for kind in params.fields.values()) + "0q"
    fields = dict(zip(params.fields, struct.unpack(layout, packed), strict=True))
    for name in params.pointers:
        if name in ("exp_sums", "max_logits"):
            fields[name] -= fields["tmp_out"]
    for name in params.pointers:
        if fields[name] and fields[name] % fake_cupy.APART == 0:
            fields[name] = "new"
    return fields


def described(result):
    """What kind of arrays an op returned."""
    if isinstance(result, tuple):
        return tuple(map(described, result))
    return result and (type(result), result.shape, result.dtype)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    modules = {"torch": machine.torch, "cupy": SimpleNamespace(ndarray=fake_cupy.ndarray)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    machine.cupy.install(monkeypatch)
    monkeypatch.setattr(in_flight, "_queues", {})
    monkeypatch.setattr(prepared, "_kept", prepared._Kept())
    for name in "_of_streams", "_slabs":
        monkeypatch.setattr(counters, name, {})
    monkeypatch.setattr(counters, "_kept", [])

    def counting(check):
        def counted(*arguments):
            machine.checked += 1
            return check(*arguments)

        return counted

    # What each op asks when it checks a call, and only then.
    for module, name in (
        (attention, "check_call"), (merge, "launch_stream"), (cache_ops, "launch_stream"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, counting(getattr(module, name)))
    caches = [prepared._describer, gpu.device_limits, gpu.external_stream]
    for cache in caches:
        cache.cache_clear()
    yield machine
    for cache in caches:
        cache.cache_clear()
    assert machine.cupy.device == 0, "the current device was left changed"
    assert not machine.torch.lent, "memory of torch's pool was not given back"


def forget():
    prepared._kept.calls.clear()
    prepared._kept.last.clear()


def moved(given):
    """The same arrays at other addresses."""
    return {n: NUMPY.array(x) if isinstance(x, np.ndarray) else x for n, x in given.items()}


def wide(**changes):
    """A good call whose sequences may have several partitions."""
    problem = build(Case(seq_lens=(40, 17)))
    given = {**ops.arguments(problem, NUMPY), "block_tables": np.zeros((2, 100), np.int32)}
    return {**given, "max_seq_len": None, **changes}


CALLS = {
    "out=": ("paged_attention", attention_arguments),
    "a new out": ("paged_attention", lambda: {**attention_arguments(), "out": None}),
    "scratch": ("paged_attention", wide),
    "lse": ("paged_attention", lambda: wide(return_lse=True)),
    "v1": ("paged_attention_v1", v1_arguments),
    "arrays of scales": (
        "paged_attention",
        lambda: wide(
            key_cache=np.ones((9, 2, 16, 64), np.uint8),
            value_cache=np.ones((9, 2, 16, 64), np.uint8),
            kv_cache_dtype="fp8",
            k_scale=np.ones(1, np.float32),
            v_scale=np.ones(1, np.float32),
        ),
    ),
    "scales that nobody reads": (
        "paged_attention",
        lambda: wide(k_scale=np.ones(1, np.float32), v_scale=np.ones(1, np.float32)),
    ),
    "block-sparse": ("paged_attention", lambda: wide(blocksparse_vert_stride=4)),
    "float32": (
        "paged_attention",
        lambda: wide(**{n: np.ones(s, np.float32) for n, s in (
            ("query", (2, 4, 64)), ("key_cache", (3, 2, 16, 64)), ("value_cache", (3, 2, 16, 64))
        )}),
    ),
    "merge": ("merge_attn_states", merge_arguments),
    "merge into new arrays": (
        "merge_attn_states", lambda: {**merge_arguments(), "output": None, "output_lse": None},
    ),
    "merge without lse": ("merge_attn_states", lambda: {**merge_arguments(), "output_lse": None}),
    "merge to fp8": (
        "merge_attn_states",
        lambda: {
            **merge_arguments(),
            "output": np.zeros((6, 4, 64), np.uint8),
            "output_scale": np.ones(1, np.float32),
        },
    ),
    "merge of some tokens": (
        "merge_attn_states", lambda: {**merge_arguments(), "prefill_tokens_with_context": 2},
    ),
    "writer": ("reshape_and_cache", vllm_arguments),
    "flash writer": ("reshape_and_cache_flash", flash_arguments),
    "writer to fp8": (
        "reshape_and_cache_flash",
        lambda: {
            **flash_arguments(),
            **{name: np.zeros((3, 16, 2, 64), np.uint8) for name in ("key_cache", "value_cache")},
            "kv_cache_dtype": "fp8",
            "k_scale": np.ones(1, np.float32),
        },
    ),
    "to fp8": ("convert_fp8", convert_arguments),
    "from fp8": (
        "convert_fp8",
        lambda: {"output": np.zeros((3, 8), np.float32), "input": np.zeros((3, 8), np.uint8)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_is_queued_as_if_it_were_checked(machine, kind, name):
    operator, arguments = CALLS[name]
    first = arguments()
    machine.run(operator, kind, first)
    assert (machine.checked, len(prepared._kept.calls)) == (1, 1)
    given = moved(first)
    again = machine.run(operator, kind, given)
    assert (machine.checked, len(prepared._kept.calls)) == (1, 1)
    calls, params, _ = again
    assert params and {call[1] for call in calls} >= {"launchKernel"}
    forget()
    assert machine.run(operator, kind, given) == again
    assert machine.checked == 2


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("operator", GOOD)
def test_each_array_is_where_its_kernel_looks_for_it(machine, kind, operator):
    for _ in range(2):
        arguments = moved(GOOD[operator]())
        _, (fields,), _ = machine.run(operator, kind, arguments)
        for name, value in arguments.items():
            if isinstance(value, np.ndarray):
                assert fields[name] == value.ctypes.data, name
    assert machine.checked == 1


def torch_has(bad):
    """Whether torch has arrays like those of a bad call: none of it is byte-swapped."""
    good = GOOD[bad.operator]()
    changed = {**good, **bad.change(good)}.values()
    return all(x.dtype.isnative for x in changed if isinstance(x, np.ndarray))


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        pytest.param(kind, bad, id=f"{name}-{bad}")
        for name, kind in FRAMEWORKS.items()
        for bad in BAD_CALLS
        if bad.operator in GOOD and (kind is not fake_cupy.Tensor or torch_has(bad))
    ],
)
def test_a_call_that_changed_is_checked_again(machine, kind, bad):
    good = GOOD[bad.operator]()
    assert machine.run(bad.operator, kind, good)[1]
    changed = {**good, **bad.change(good)}
    machine.run(bad.operator, kind, good)
    warm = machine.run(bad.operator, kind, changed)
    forget()
    assert machine.run(bad.operator, kind, changed) == warm


GOOD_CHANGES = {
    "query": lambda g: {"query": np.repeat(g["query"], 2, axis=0)[::2]},
    "query's address": lambda g: {"query": off_by(2)(g["query"])},
    "key_cache's address": lambda g: {"key_cache": off_by(8)(g["key_cache"])},
    "value_cache's strides": lambda g: {"value_cache": np.repeat(g["value_cache"], 2, 0)[::2]},
    "layout": lambda g: {"layout": None},
    "block_tables": lambda g: {"block_tables": np.zeros((2, 99), np.int32)},
    "rows of block_tables": lambda g: {"block_tables": np.zeros((2, 99), np.int32)[:, :60]},
    "scale": lambda g: {"scale": 0.25},
    "an int for a float": lambda g: {"scale": 1},
    "max_seq_len": lambda g: {"max_seq_len": 33},
    "no alibi_slopes": lambda g: {"alibi_slopes": None},
    "an array for a scale": lambda g: {"k_scale": np.ones(1, np.float32)},
    "arrays for both scales": lambda g: dict.fromkeys(
        ("k_scale", "v_scale"), np.ones(1, np.float32)
    ),
    "dtype": lambda g: {
        name: np.ones(g[name].shape, np.float32)
        for name in ("query", "key_cache", "value_cache", "out")
    },
    "out's strides": lambda g: {"out": np.zeros((2, 8, 64), np.float16)[:, ::2]},
    "no out": lambda g: {"out": None},
    "lse": lambda g: {"return_lse": True},
    "stream": lambda g: {"stream": 77},
    "another sparse pattern": lambda g: {"blocksparse_vert_stride": 8, "tp_rank": 1},
}


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("what", GOOD_CHANGES)
def test_a_good_change_is_seen(machine, kind, what):
    good = attention_arguments()
    machine.run("paged_attention", kind, good)
    changed = {**good, **GOOD_CHANGES[what](good)}
    first = machine.run("paged_attention", kind, changed)
    again = machine.run("paged_attention", kind, changed)
    forget()
    assert machine.run("paged_attention", kind, changed) == first == again
    assert first[1]


def halves(*shape):
    return np.ones(shape, np.float16)


OTHER_CHANGES = {
    "merge_attn_states": {
        "tokens": lambda g: {
            **{name: halves(5, 4, 64) for name in ("prefix_output", "suffix_output", "output")},
            **{
                name: np.zeros((4, 5), np.float32)
                for name in ("prefix_lse", "suffix_lse", "output_lse")
            },
        },
        "output's strides": lambda g: {"output": halves(6, 8, 64)[:, ::2]},
        "output's address": lambda g: {"output": off_by(4)(g["output"])},
        "suffix's address": lambda g: {"suffix_output": off_by(2)(g["suffix_output"])},
        "tokens first in lse": lambda g: {"suffix_lse": np.zeros((6, 4), np.float32).T},
        "no output": lambda g: {"output": None, "output_lse": None},
        "no lse": lambda g: {"output_lse": None},
        "context": lambda g: {"prefill_tokens_with_context": 4},
        "a scale": lambda g: {"output": np.zeros((6, 4, 64), np.uint8), "output_scale": 2.0},
        "stream": lambda g: {"stream": 77},
    },
    "reshape_and_cache": {
        "fewer slots": lambda g: {"slot_mapping": np.arange(4)},
        "key's strides": lambda g: {"key": halves(10, 2, 64)[::2]},
        "value's address": lambda g: {"value": off_by(2)(g["value"])},
        "value_cache's address": lambda g: {"value_cache": off_by(2)(g["value_cache"])},
        "a scale": lambda g: {"k_scale": 0.5},
        "an array for a scale": lambda g: {"v_scale": np.ones(1, np.float32)},
        "fp8": lambda g: {
            "key_cache": np.zeros((3, 2, 4, 16, 16), np.uint8),
            "value_cache": np.zeros((3, 2, 64, 16), np.uint8),
            "kv_cache_dtype": "fp8",
        },
    },
    "reshape_and_cache_flash": {
        "layout": lambda g: {
            "layout": "HND",
            **{name: halves(3, 2, 16, 64) for name in ("key_cache", "value_cache")},
        },
        "fewer slots": lambda g: {"slot_mapping": np.arange(3)},
    },
    "convert_fp8": {
        "format": lambda g: {"kv_dtype": "fp8_e5m2"},
        "scale": lambda g: {"scale": 3.0},
        "the other way": lambda g: {"output": halves(3, 8), "input": np.ones((3, 8), np.uint8)},
        "size": lambda g: {"output": np.zeros(9, np.uint8), "input": halves(9)},
    },
}


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize(
    ("operator", "what"),
    [(operator, what) for operator, changes in OTHER_CHANGES.items() for what in changes],
)
def test_a_good_change_of_another_op_is_seen(machine, kind, operator, what):
    good = GOOD[operator]()
    changed = {**good, **OTHER_CHANGES[operator][what](good)}
    runs = [machine.run(operator, kind, given) for given in (good, changed) * 3]
    assert machine.checked == (1 if what == "stream" else 2)
    assert runs[0] == runs[2] == runs[4] != runs[1] == runs[3] == runs[5]
    forget()
    assert machine.run(operator, kind, changed) == runs[1]
    assert runs[1][1]


def test_layouts_of_one_shape_are_told_apart(machine):
    given = {**flash_arguments(), **{n: halves(3, 2, 2, 64) for n in ("key_cache", "value_cache")}}
    for layout in "NHD", "HND", "NHD", "HND":
        machine.run("reshape_and_cache_flash", fake_cupy.ndarray, {**given, "layout": layout})
    assert machine.checked == 2


def test_vllm_and_flash_writers_do_not_share(machine):
    machine.run("reshape_and_cache_flash", fake_cupy.ndarray, flash_arguments())
    error, _ = machine.run("reshape_and_cache", fake_cupy.ndarray, flash_arguments())
    assert error is ValueError


@pytest.mark.parametrize("operator", GOOD)
def test_an_array_that_was_changed_in_place_is_checked_again(machine, operator):
    """The object is the same, and what it says of itself is not."""
    good = {
        name: fake_cupy.ndarray(x) if isinstance(x, np.ndarray) else x
        for name, x in GOOD[operator]().items()
    }
    call = getattr(cupy_paged, operator)
    for name, x in good.items():
        if not isinstance(x, fake_cupy.ndarray):
            continue
        for attribute, value in (
            ("shape", (*x.shape[:-1], x.shape[-1] + 1)),
            ("strides", (*x.strides[:-1], 3 * x.itemsize)),
            ("dtype", np.dtype(np.complex64)),
            ("data", SimpleNamespace(ptr=x.data.ptr, device_id=1)),
            ("data", SimpleNamespace(ptr=x.data.ptr + 1, device_id=0)),
        ):
            for _ in range(2):
                call(**good)
            checked, before = machine.checked, getattr(x, attribute)
            setattr(x, attribute, value)
            with contextlib.suppress(TypeError, ValueError):
                call(**good)
            assert machine.checked == checked + 1, (name, attribute)
            setattr(x, attribute, before)


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_devices_and_streams_are_told_apart(machine, kind):
    streams = {fake_cupy.ndarray: machine.cupy, fake_cupy.Tensor: machine.torch}[kind]
    for _ in range(2):
        for device in 0, 1:
            for stream in 300, 301, 0, 2:
                streams.current_streams[device] = stream
                calls, *_ = machine.run("paged_attention", kind, wide(), device)
                *_, launch = calls
                assert (launch[0], launch[1], launch[-1]) == (device, "launchKernel", stream)
                allocated = [call[-1] for call in calls if call[1] in ALLOCATIONS]
                assert allocated == [stream, stream]
    assert machine.checked == 2


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize(
    ("operator", "name"),
    [(op, name) for op, good in GOOD.items() for name, x in good().items() if hasattr(x, "shape")],
)
def test_an_array_on_another_device_is_refused(machine, kind, operator, name):
    good = GOOD[operator]()
    changed = {**good, name: kind(good[name], device=1)}
    first = machine.run(operator, kind, changed)
    assert machine.run(operator, kind, good)[1], "the others are right"
    error, message = machine.run(operator, kind, changed)
    assert error is ValueError and "cuda:1" in message
    assert (error, message) == first


ALWAYS_CHECKED = [
    (operator, name)
    for operator in (
        "paged_attention_v2",
        "copy_blocks",
        "gather_cache",
        "convert_layout",
        "concat_and_cache_mla",
    )
    for name, x in bad_calls.GOOD[operator]().items()
    if isinstance(x, np.ndarray | list)
]


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize(("operator", "name"), ALWAYS_CHECKED)
def test_an_op_that_is_checked_each_time_refuses_arrays_of_two_devices(
    machine, kind, operator, name
):
    def put(x, device):
        if isinstance(x, list):
            return [kind(first, 0) if i else kind(first, device) for i, first in enumerate(x)]
        return kind(x, device) if isinstance(x, np.ndarray) else x

    given = bad_calls.GOOD[operator]()
    with pytest.raises(ValueError, match="is on cuda:"):
        getattr(cupy_paged, operator)(**{n: put(x, int(n == name)) for n, x in given.items()})
    assert not machine.packed
    getattr(cupy_paged, operator)(**{n: put(x, 0) for n, x in given.items()})
    assert machine.packed, "the others are right"


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("device", [0, 1])
def test_blocks_are_not_swapped_between_two_devices(machine, kind, device):
    given = bad_calls.swap_arguments()
    given["source"] = kind(given["source"], device)
    given["destination"] = kind(given["destination"], 1 - device)
    message = f"^destination: is on cuda:{1 - device}, but source is on cuda:{device}"
    with pytest.raises(ValueError, match=message):
        cupy_paged.swap_blocks(**given)


def test_shared_memory_does_not_grow_with_the_context(machine):
    asked = set()
    for num_columns in 1, 100, 2**16 + 1:  # of 16 tokens: a million and more
        given = wide(block_tables=np.zeros((2, num_columns), np.int32))
        calls, *_ = machine.run("paged_attention", fake_cupy.ndarray, given)
        asked |= {call[-2] for call in calls if call[1] == "launchKernel"}
    (num_bytes,) = asked
    assert 0 < num_bytes <= gpu.device_limits(0).shared_bytes


def test_calls_leave_nothing_behind(machine):
    given, calls = wide(), 3000

    def memory_after(calls):
        for _ in range(calls):
            machine.run("paged_attention", fake_cupy.ndarray, given)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = memory_after(1000)  # which fill the interpreter's own lists
        grown = memory_after(calls) - before
    finally:
        tracemalloc.stop()
    assert machine.checked == 1
    assert grown < 16 * calls, "an object for each call: the smallest has 28 bytes"


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_another_stream_than_the_current_one(machine, kind):
    machine.run("paged_attention", kind, wide())
    calls, *_ = machine.run("paged_attention", kind, wide(stream=77))
    assert [call[-1] for call in calls] == [77, 77, 77]
    assert machine.checked == 1


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_a_capture_is_checked_and_gets_memory_of_its_own(machine, kind):
    given = wide(out=np.zeros((2, 4, 64), np.float16))
    eager, captured = ["alloc" if kind is fake_cupy.ndarray else "torch.alloc"], ["mallocAsync"]
    for run, capturing in enumerate((False, True, False)):
        machine.cupy.capturing = {100, 200} if capturing else set()
        calls, *_ = machine.run("paged_attention", kind, given)
        expected = (
            [*captured, "launchKernel", "freeAsync"] if capturing else [*eager, "launchKernel"]
        )
        assert [call[1] for call in calls] == expected
        assert machine.checked == 1 + (run > 0)


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
@pytest.mark.parametrize("operator", GOOD)
def test_every_op_is_checked_in_a_capture(machine, kind, operator):
    for run, capturing in enumerate((False, True, False)):
        machine.cupy.capturing = {100, 200} if capturing else set()
        calls, *_ = machine.run(operator, kind, GOOD[operator]())
        assert [call[1] for call in calls] == ["launchKernel"]
        assert machine.checked == 1 + (run > 0)


def test_scratch_of_torch_is_on_the_device_even_if_torch_remembers_another(machine):
    given = wide(out=np.zeros((2, 4, 64), np.float16))
    for remembered, expected in ((None, "torch.alloc"), (1, "torch.empty")) * 2:
        machine.torch.remembered_device = remembered
        calls, *_ = machine.run("paged_attention", fake_cupy.Tensor, given)
        assert [call[1] for call in calls] == [expected, "launchKernel"]
    assert machine.checked == 1


@pytest.mark.parametrize("kind", FRAMEWORKS.values(), ids=FRAMEWORKS)
def test_scratch_is_cut_into_pieces_that_follow_each_other(machine, kind):
    for _ in range(2):
        calls, (fields,), _ = machine.run("paged_attention", kind, wide(out=halves(2, 4, 64)))
        (num_bytes,) = {call[2] for call in calls if call[1] in ALLOCATIONS}
        tmp_out, states = 4 * 2 * 4 * 4 * 64, 4 * 2 * 4 * 4  # of 4 partitions
        assert fields["tmp_out"] == "new"
        assert (fields["exp_sums"], fields["max_logits"]) == (tmp_out, tmp_out + states)
        assert num_bytes == tmp_out + 2 * states


def test_scratch_goes_back_where_a_launch_fails(machine):
    given = wide(out=np.zeros((2, 4, 64), np.float16))
    machine.run("paged_attention", fake_cupy.Tensor, given)

    def launched(address):
        assert machine.torch.lent
        raise MemoryError

    machine.cupy.launched = launched
    error, _ = machine.run("paged_attention", fake_cupy.Tensor, given)
    assert error is MemoryError


def test_what_is_kept_keeps_no_array_alive(machine):
    for operator in GOOD:
        given = {
            name: fake_cupy.Tensor(x) if isinstance(x, np.ndarray) else x
            for name, x in GOOD[operator]().items()
        }
        for _ in range(2):
            getattr(cupy_paged, operator)(**given)
        alive = [weakref.ref(x) for x in given.values() if isinstance(x, fake_cupy.Tensor)]
        given.clear()
        assert prepared._kept.last[operator.removesuffix("_flash")]
        assert [ref() for ref in alive] == [None] * len(alive)


def test_arrays_of_two_frameworks_are_checked_each_time(machine):
    given = wide(seq_lens=fake_cupy.Tensor(np.ones(2, np.int32)))
    for run in 1, 2:
        calls, *_ = machine.run("paged_attention", fake_cupy.ndarray, given)
        assert [call[1] for call in calls].count("streamWaitEvent") == 2
        assert machine.checked == run
    assert not prepared._kept.calls


def test_a_subclass_is_checked_each_time(machine):
    class Tagged(fake_cupy.Tensor):
        pass

    for run in 1, 2:
        assert machine.run("paged_attention", Tagged, wide())[1]
        assert machine.checked == run


def test_the_emulated_chip_is_seen(machine, monkeypatch):
    kernels = []
    for sm in None, 75, None, 75:
        monkeypatch.setattr(gpu, "emulated_sm", lambda sm=sm: sm)
        calls, *_ = machine.run("paged_attention", fake_cupy.ndarray, wide())
        kernels.append([call[2] for call in calls if call[1] == "launchKernel"])
    assert kernels[0] == kernels[2] != kernels[1] == kernels[3]
    assert machine.checked == 2


def test_the_emulated_chip_is_an_environment_variable(monkeypatch):
    read = gpu.emulated_sm.__wrapped__
    monkeypatch.delenv("CUPY_PAGED_EMULATE_SM", raising=False)
    assert read() is None
    monkeypatch.setenv("CUPY_PAGED_EMULATE_SM", "75")
    assert read() == 75


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"scale": 1.0}, {"scale": True}),
        ({"k_scale": 1.0}, {"k_scale": True}),
        ({"max_seq_len": 40}, {"max_seq_len": 40.0}),
        ({"blocksparse_vert_stride": 0}, {"blocksparse_vert_stride": False}),
    ],
    ids=str,
)
def test_equal_values_of_another_type_are_checked(machine, good, bad):
    for _ in range(2):
        machine.run("paged_attention", fake_cupy.ndarray, wide(**good))
    error, _ = machine.run("paged_attention", fake_cupy.ndarray, wide(**bad))
    assert error is TypeError


def test_scales_go_to_the_kernel_for_fp8_alone(machine):
    for name, expected in ("arrays of scales", True), ("scales that nobody reads", False):
        operator, arguments = CALLS[name]
        for _ in range(2):
            _, (fields,), _ = machine.run(operator, fake_cupy.ndarray, arguments())
            assert bool(fields["k_scale_array"]) == bool(fields["v_scale_array"]) == expected
            assert fields["k_scale"] == fields["v_scale"] == 1


def test_an_argument_that_cannot_be_hashed_is_checked(machine):
    given = wide(layout=["HND"])
    error, message = machine.run("paged_attention", fake_cupy.ndarray, given)
    assert (error, message[:7]) == (ValueError, "layout:")


def test_what_is_kept_has_an_end(machine, monkeypatch):
    monkeypatch.setattr(prepared, "MOST", 10)
    for max_seq_len in range(100, 125):
        machine.run("paged_attention", fake_cupy.ndarray, wide(max_seq_len=max_seq_len))
        assert len(prepared._kept.calls) <= 10


def test_kept_arrays_are_released(machine):
    class Done:
        done = True

    machine.run("paged_attention", fake_cupy.ndarray, wide())
    in_flight._queues[0, 5] = deque([(Done(), [])])
    machine.run("paged_attention", fake_cupy.ndarray, wide())
    assert machine.checked == 1 and not in_flight._queues


def test_a_thread_without_a_context_gets_one(machine):
    machine.run("paged_attention", fake_cupy.ndarray, wide())
    machine.cupy.has_context = False
    calls, *_ = machine.run("paged_attention", fake_cupy.ndarray, wide())
    assert calls[-1][1] == "launchKernel" and machine.cupy.has_context


def test_threads_never_share_a_struct(machine):
    """Each launch reads the addresses of its own call, however threads interleave."""
    seen, failures, local = [], [], threading.local()

    def launched(address):
        packed = ctypes.string_at(address, PARAMS.size)
        assert unpacked(packed)["out"] == local.out
        seen.append(local.out)

    machine.cupy.launched = launched
    machine.cupy.log = lambda *_: None
    switch = sys.getswitchinterval()

    def work():
        try:
            given = {
                name: fake_cupy.ndarray(x) if isinstance(x, np.ndarray) else x
                for name, x in attention_arguments().items()
            }
            local.out = given["out"].data.ptr
            for _ in range(300):
                cupy_paged.paged_attention(**given)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert not failures and len(seen) == 8 * 300


def test_an_array_in_two_places_is_told_apart():
    torch = pytest.importorskip("torch")
    query, out = torch.ones(4), torch.ones(4)
    keys = [
        prepared._likeness(query, ("op",), given)[0] for given in ((query, out), (query, query))
    ]
    assert keys[0] != keys[1]
